"""The scores of each validation, for programs: a tuner that ends hopeless runs early, a plot, a notebook."""

import contextlib
import json
import math
from pathlib import Path

from segfit.engine.events import EpochLog, Listener


class ScoresFile(Listener):
    """A listener that appends a line of JSON for each validation.

    A line holds `epoch` (0-based), `update`, `best` (whether no validation before was better) and `scores`
    (name → number, null where undefined). A run that was killed validates some epochs again: of two lines of an
    epoch the later one counts.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def epoch(self, log: EpochLog) -> None:
        """Append the epoch's scores, if it was validated."""
        if log.result is None:
            return
        found = log.result.scores
        scores = {name: found[name] if math.isfinite(found[name]) else None for name in found}
        line = {"epoch": log.epoch, "update": log.update, "best": log.is_best, "scores": scores}
        # Opened each time: a line is written whole, and is there for other programs to read.
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
