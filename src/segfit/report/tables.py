"""Tables on screen."""

import math
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.report.text import ABSENT, shown_path


def print_findings(findings: Findings, written: Iterable[Path], console: Console) -> None:
    """Print the tables, what was written, and the headline last."""
    for table in findings.tables:
        console.print(grid(table))
    for path in written:
        console.print(f"Written to {shown_path(path)}", markup=False, soft_wrap=True)
    if findings.headline:
        console.print(findings.headline, markup=False, style="bold")


def grid(table: Table) -> Grid:
    """Return a table for rich: words to the left, numbers to the right, "–" for what is absent."""
    columns = table.columns
    shown = Grid(title=table.title or None, title_justify="left")
    shown.caption, shown.caption_justify = table.caption or None, "left"
    for index, column in enumerate(columns):
        words = any(isinstance(row[index], str) for row in table.rows)
        shown.add_column(Text(column.name), justify="left" if words else "right")
    for number, row in enumerate(table.rows):
        cells = [_cell(*pair) for pair in zip(row, columns, strict=True)]
        if table.colors is not None:
            color = "rgb({},{},{})".format(*table.colors[number])
            cells[0] = Text.assemble(("■ ", color), cells[0])
        shown.add_row(*cells, style="bold" if number == table.emphasis else None)
    shown.add_section()
    for row in table.totals:
        cells = [_cell(*pair) for pair in zip(row, columns, strict=True)]
        shown.add_row(*cells, style="bold")
    return shown


def _cell(value: Cell, column: Column) -> Text:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return Text(ABSENT)
    if isinstance(value, bool):
        return Text("yes" if value else "no")
    return Text(value if isinstance(value, str) else format(value, column.spec))
