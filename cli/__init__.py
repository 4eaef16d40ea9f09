"""The Typer application `lvd`."""
