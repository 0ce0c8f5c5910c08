"""What was found as files: JSON, CSV, PNG; what a benchmark leaves on disk."""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfit.engine.findings import Cell, Findings
from segfit.system.files import replace_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write strict JSON, all or nothing; NaN and infinity, which JSON lacks, become null. May raise an OSError.

    `values` are numbers (NumPy's and 0-d tensors too), strings, paths, lists, arrays and mappings.
    """
    replace_text(path, json_text(values) + "\n")


def json_text(values: Mapping[str, Any], indent: int | None = 2) -> str:
    """Return what `write_json` writes."""
    return json.dumps(_plain(values), indent=indent, ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy arrays and scalars, tensors
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def files_of(findings: Findings) -> Iterator[tuple[str, bytes]]:
    """Yield the name and content of a CSV file a table and a PNG file a figure."""
    for table in findings.tables:
        text = io.StringIO(newline="")
        heads = [column.name for column in table.columns]
        csv.writer(text).writerows([heads, *table.rows])  # None becomes an empty cell
        yield f"{table.name}.csv", text.getvalue().encode()
    for name, draw in findings.figures.items():
        yield f"{name}.png", png(draw)


def png(draw: "Callable[[], Figure]") -> bytes:
    """Draw a figure and render it."""
    content = io.BytesIO()
    draw().savefig(content, format="png")
    return content.getvalue()


def write_findings(findings: Findings, folder: Path, about: Mapping[str, Any]) -> None:
    """Write results.json, a CSV file a table, a PNG file a figure, and TensorBoard events, into `folder`, which exists.

    `about` says in results.json what was measured and where.
    """
    from segfit.report.tensorboard import write_events

    tables: dict[str, list[dict[str, Cell]]] = {}
    for table in findings.tables:
        names = [column.name for column in table.columns]
        tables[table.name] = [dict(zip(names, row, strict=True)) for row in table.rows]
    date = datetime.now().astimezone().isoformat(timespec="seconds")
    found = {"values": findings.values, "tables": tables}
    results = {"date": date, "headline": findings.headline, **about, **found}
    write_json(folder / "results.json", results)
    files = dict(files_of(findings))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    images = {path.stem: files[path.name] for path in map(Path, files) if path.suffix == ".png"}
    write_events(folder, json_text(results), findings.scalars, images)
