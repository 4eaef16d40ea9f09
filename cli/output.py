"""How results are printed: tables for people; CSV, JSON and Markdown for programs."""

import csv
import json
import sys
from enum import StrEnum
from typing import Any

from pipelines.stats import Table, cell, markdown


class Format(StrEnum):
    """What results look like."""

    table = "table"
    csv = "csv"
    json = "json"
    markdown = "markdown"


def print_tables(tables: list[Table], style: Format) -> None:
    """Print a report; JSON is one object by title."""
    if style is Format.json:
        print(
            json.dumps(
                {t.title: [dict(zip(t.columns, row, strict=True)) for row in t.rows] for t in tables}, default=str
            )
        )
        return
    for number, table in enumerate(tables):
        if number and style is not Format.csv:
            print()
        print_table(table, style)


def print_table(table: Table, style: Format) -> None:
    """Print one table to standard output."""
    if style is Format.json:
        print(json.dumps([dict(zip(table.columns, row, strict=True)) for row in table.rows], default=str))
    elif style is Format.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(table.rows)
    elif style is Format.markdown:
        print((f"### {table.title}\n\n" if table.title else "") + markdown(table))
    else:
        _print_rich(table)


def _print_rich(table: Table) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    rich = RichTable(title=table.title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for number, name in enumerate(table.columns):
        numeric = bool(table.rows) and all(isinstance(r[number], int | float | None) for r in table.rows)
        rich.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(cell(value)) for value in row))
    width = None if sys.stdout.isatty() else 160
    Console(width=width).print(rich)


def arrow_table(result: Any, title: str = "") -> Table:
    """An Arrow table as a report's table."""
    rows = [list(row.values()) for row in result.to_pylist()]
    return Table(title, list(result.schema.names), rows)
