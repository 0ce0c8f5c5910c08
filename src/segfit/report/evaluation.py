"""The folder of one evaluation: metrics.json, tables and figures; a task adds what it keeps of its predictions."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from segfit.engine.findings import Findings
from segfit.engine.task import Task
from segfit.errors import SegFitError
from segfit.report.files import files_of, json_text
from segfit.system.files import atomic_write, reporting

METRICS = "metrics.json"
_KIND = "evaluation"


class Evaluation:
    """What an evaluation writes to `path`. Files of an earlier one are replaced, never those of somebody else.

    `task` scores the batches; `facts` are those that only the task knows, for metrics.json; `names` are those of the files
    and folders that are written besides it, in the order in which they are shown. Raises a SegFitError if the folder holds
    files under our names that evaluate.py did not write, or cannot be made.
    """

    def __init__(
        self, path: Path, task: Task, facts: Mapping[str, Any], names: Sequence[str] = ()
    ) -> None:
        self.path, self.task, self.facts = path, task, facts
        self.names = (METRICS, *names)
        there = [name for name in self.names if os.path.lexists(path / name)]
        if there and not _is_evaluation(path / METRICS):
            raise SegFitError(
                f"out={path}: {', '.join(there)} in it would be replaced, and evaluate.py did not write "
                f"{'it' if len(there) == 1 else 'them'}. Choose another folder."
            )
        with reporting(f"out={path}: cannot be made"):
            path.mkdir(parents=True, exist_ok=True)

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Write metrics.json; written first, it marks the folder as an evaluation's. Raises as `write`."""
        self.write(self.path / METRICS, (json_text({"kind": _KIND, **values}) + "\n").encode())

    def finish(self, result: Findings) -> Findings:
        """Write what is left of the predictions, a CSV file a table and a PNG file a figure; return what is shown.

        Raises as `write`.
        """
        for name, content in files_of(result):
            self.write(self.path / name, content)
        return result

    def close(self) -> None:
        """Release what is held; may be called again."""

    def written(self) -> list[Path]:
        """Return the files and folders that are there."""
        return [self.path / name for name in self.names if (self.path / name).exists()]

    def write(self, path: Path, content: bytes) -> None:
        """Write a file, all or nothing; raise a SegFitError if it cannot be written."""
        with reporting(f"cannot write {path}"), atomic_write(path, sync=False) as file:
            file.write(content)


def _is_evaluation(metrics: Path) -> bool:
    try:
        values = json.loads(metrics.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(values, dict) and values.get("kind") == _KIND
