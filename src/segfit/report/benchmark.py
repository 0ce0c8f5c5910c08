"""What a benchmark leaves on disk."""

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from segfit.engine.findings import Cell, Findings, Table
from segfit.report.events_file import write_events
from segfit.report.files import files_of, json_text, write_json


def write_findings(
    findings: Findings,
    folder: Path,
    *,
    mode: str,
    command: str,
    machine: Mapping[str, Any],
    config: Mapping[str, Any],
) -> None:
    """Write results.json, a CSV file a table, a PNG file a figure, and TensorBoard events, into `folder`, which exists."""
    results = {
        "benchmark": mode,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "headline": findings.headline,
        "machine": machine,
        "values": findings.values,
        "tables": {table.name: _named(table) for table in findings.tables},
        "config": config,
    }
    write_json(folder / "results.json", results)
    images = {}
    for name, content in files_of(findings):
        (folder / name).write_bytes(content)
        if name.endswith(".png"):
            images[name.removesuffix(".png")] = content
    write_events(folder, json_text(results), findings.scalars, images)


def _named(table: Table) -> list[dict[str, Cell]]:
    names = [column.name for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.rows]
