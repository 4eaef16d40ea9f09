"""The algorithms: arrays and Arrow tables in, arrays and Arrow tables out. Knows no Ray and no Typer."""
