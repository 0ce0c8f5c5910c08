"""What a benchmark leaves on disk."""

import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from segfit.engine.findings import Cell, Findings, Table
from segfit.report.files import files_of, image_of, json_text, write_json


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
    _write_events(folder, json_text(results), findings.scalars, images)


def _named(table: Table) -> list[dict[str, Cell]]:
    names = [column.name for column in table.columns]
    return [dict(zip(names, row, strict=True)) for row in table.rows]


def _write_events(
    folder: Path, text: str, scalars: Mapping[str, float | None], images: Mapping[str, bytes]
) -> None:
    """Write one event file: `text` as code, scalars that are not None, encoded images.

    Without torch, whose import takes longer than a remembered answer of `benchmark=plan`.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    indented = "\n".join("    " + line for line in text.splitlines())
    results = Summary.Value(
        tag="results/text_summary",
        metadata=create_summary_metadata(display_name=None, description=None),
        tensor=make_tensor_proto([indented]),
    )
    known = {tag: value for tag, value in scalars.items() if value is not None}
    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()]
    values += [Summary.Value(tag=tag, image=image_of(content)) for tag, content in images.items()]
    writer = EventFileWriter(str(folder))
    writer.add_event(Event(wall_time=time.time(), summary=Summary(value=[results, *values])))
    writer.close()
