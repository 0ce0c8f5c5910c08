"""The files of a run. They may be untrusted: nothing in them is resolved or executed, they are read as plain values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from segfit.errors import SegFitError

# The status in metrics.json of a run that is done; the others ask to be resumed.
COMPLETE = ("finished", "max_steps", "patience")


class RunFolder:
    """The paths of a run's files, below `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"  # composed, without interpolations
        self.overrides = path / "overrides.yaml"  # what was typed, a list
        self.checkpoints = path / "checkpoints"  # last.pt to resume from, best.pt to evaluate
        self.best = self.checkpoints / "best.pt"
        self.bad_batches = path / "bad_batches"  # left out, since loss or gradient were not finite
        self.samples = path / "samples.json"  # names and content keys by split
        self.tensorboard = path / "tensorboard"
        self.log = path / "train.log"
        self.scalars = path / "scalars.csv"  # with report.logger=[csv]
        self.scores = path / "scores.jsonl"  # a line for each validation
        self.curves = path / "curves.png"
        self.first_batch = path / "first_batch.png"  # of training, augmented
        self.page = path / "report.html"
        self.metrics = path / "metrics.json"  # scores, speed, memory, and the settings that ran
        self.temperature = path / "temperature.json"  # of evaluate.py temperature=fit
        self.evaluation = path / "evaluation"  # evaluate.py's, a folder for each split
        self.error = path / "error.json"  # why a job of a sweep failed
        self.output = path / "output.log"  # what a job printed, where jobs run side by side


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds: mappings, lists, strings and numbers.

    Raises a FileNotFoundError if there is none, a SegFitError if it cannot be read, or holds a tag that makes an object or
    an interpolation.
    """
    values = _parsed(path, yaml.safe_load)
    if "${" in repr(values):
        reason = "it holds an interpolation, ${…}; only plain values are allowed"
        raise SegFitError(f"{path}: not readable ({reason}).")
    return values


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping that a JSON file holds, an empty one if there is no file; raise a SegFitError if it holds none."""
    try:
        values = _parsed(path, json.loads)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    if not isinstance(values, dict):
        raise SegFitError(f"{path}: not readable (it holds no mapping).")
    return values


def _parsed(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    # A tag with a value of another kind, such as !!bool x, raises many types.
    except Exception as error:
        raise SegFitError(f"{path}: not readable ({error}).") from error
