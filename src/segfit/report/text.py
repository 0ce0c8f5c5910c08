"""Numbers, paths and tables as text: shared by console, log file, summary and leader board."""

import math
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid
from rich.text import Text

from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.errors import quoted

ABSENT = "–"  # a number that does not exist
_FILE_WIDTH = 10_000  # columns of what is no terminal: tables take the width that they need


def stdout_console() -> Console:
    """Return a console on stdout; it prints a "?" for what the encoding lacks, and cuts no table in a file or pipe."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # else a dash would end a training
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def monitored_first(monitor: str, columns: Mapping[str, str]) -> dict[str, str]:
    """Return score name → label of the monitored score, then of the others that are shown."""
    return {monitor: columns.get(monitor, monitor.replace("_", " ")), **columns}


def scores_text(scores: Mapping[str, float], columns: Mapping[str, str]) -> str:
    """Return the scores that have a column: "PSNR 29.12, SSIM 0.8617"."""
    known = [name for name in columns if name in scores]
    return ", ".join(f"{columns[name]} {number(scores[name])}" for name in known)


def number(value: float | None, spec: str = ".4f") -> str:
    """Format a number, or `ABSENT` for None and NaN."""
    return ABSENT if value is None or math.isnan(value) else format(value, spec)


def duration(seconds: float) -> str:
    """Format a duration in seconds: "0.8s", "42s", "3:05", "1:02:03", "2 days, 3:04:05"."""
    if not math.isfinite(seconds):
        return ABSENT
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{whole}s"
    return re.sub(r"^0:0?", "", f"{timedelta(seconds=whole)}")


def one_line(message: str) -> str:
    """Return the message without line breaks, so that it stays one record."""
    return " ".join(message.split())


def shown_path(path: Path) -> str:
    """Return the path relative to the working directory if it is below that, else absolute."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100  (resolve() would follow links)
    below = absolute.is_relative_to(Path.cwd())
    return str(absolute.relative_to(Path.cwd()) if below else absolute)


def hydra_override(key: str, value: str) -> str:
    """Return `key=value` for the shell such that Hydra reads the same text."""
    # A bare word that Hydra reads as this very string, and not as a number or null.
    word = value[:1].isalpha() and value.lower() not in ("null", "true", "false", "nan", "inf")
    if not (re.fullmatch(r"[A-Za-z0-9_/.+@-]+", value) and ("/" in value or word)):
        value = quoted(value)
    return shlex.quote(f"{key}={value}")


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
    shown = Grid(title=escape(table.title) or None, title_justify="left")
    shown.caption, shown.caption_justify = escape(table.caption) or None, "left"
    for index, column in enumerate(columns):
        if any(isinstance(row[index], str) for row in table.rows):
            shown.add_column(Text(column.name), overflow="fold")
        else:
            shown.add_column(Text(column.name), justify="right")
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
