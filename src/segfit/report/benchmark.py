"""A benchmark's findings on screen and on disk."""

import csv
import json
import math
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table as Grid

from segfit.report.events_file import write_events
from segfit.report.findings import Cell, Column, Findings, Table
from segfit.report.text import ABSENT, shown_path


class BenchmarkProgress:
    """One line that says what is measured; on a stream that is no terminal, a line for each new thing.

    Args:
        console: where it goes.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` measurements are made, and that `what` is being measured."""
        if not self.console.is_terminal:
            if what != self._what:
                self.console.print(f"[{done + 1}/{total}] {what}", markup=False)
            self._what = what
            return
        if self._bar is None:
            self._bar = Progress(console=self.console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("", total=total)
        self._bar.update(self._task, description=what, completed=done, total=total)

    def close(self) -> None:
        """Remove the line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def print_findings(findings: Findings, folder: Path, console: Console) -> None:
    """Print the tables, where everything lies, and the headline last."""
    for table in findings.tables:
        console.print(_grid(table))
    console.print(f"Written to {shown_path(folder)}", markup=False)
    console.print(findings.headline, markup=False, style="bold")


def write_findings(
    findings: Findings,
    folder: Path,
    *,
    mode: str,
    command: str,
    machine: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write results.json, a CSV file a table, a PNG file a figure, and TensorBoard events, into `folder`.

    Args:
        findings: of the mode.
        folder: exists.
        mode: its name.
        command: that was typed.
        machine: device, driver and versions.
        config: the composed one.
    """
    results = {
        "benchmark": mode,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "headline": findings.headline,
        "machine": machine,
        "values": findings.values,
        "tables": {
            table.name: [
                dict(zip([column.name for column in table.columns], row, strict=True))
                for row in table.rows
            ]
            for table in findings.tables
        },
        "config": config,
    }
    text = json.dumps(_finite(results), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    for table in findings.tables:
        _write_csv(table, folder / f"{table.name}.csv")
    for name, figure in findings.figures.items():
        figure.savefig(folder / f"{name}.png")
    indented = "\n".join("    " + line for line in text.splitlines())
    write_events(folder, indented, findings.scalars, findings.figures)


def _finite(value: Any) -> Any:
    """Return plain values without NaN and infinities, which JSON lacks: they become null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_csv(table: Table, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([column.name for column in table.columns])
        writer.writerows([["" if cell is None else cell for cell in row] for row in table.rows])


def _grid(table: Table) -> Grid:
    grid = Grid(title=table.title, title_justify="left")
    for index, column in enumerate(table.columns):
        words = any(isinstance(row[index], str) for row in table.rows)
        grid.add_column(column.name, justify="left" if words else "right")
    for number, row in enumerate(table.rows):
        cells = [_cell(*pair) for pair in zip(row, table.columns, strict=True)]
        grid.add_row(*cells, style="bold" if number == table.emphasis else None)
    return grid


def _cell(value: Cell, column: Column) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else format(value, column.spec)
