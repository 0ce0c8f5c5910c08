"""What a benchmark shows while it measures, and what it leaves on disk."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from segfit.engine.findings import Findings
from segfit.report.events_file import write_events
from segfit.report.files import files_of, json_text, write_json


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
    write_json(folder / "results.json", results)
    files = dict(files_of(findings))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    images = {
        name.removesuffix(".png"): content
        for name, content in files.items()
        if name.endswith(".png")
    }
    write_events(folder, json_text(results), findings.scalars, images)
