"""The folder of one evaluation: metrics.json, tables and figures; a task adds what it keeps of its predictions."""

import math
import os
from abc import abstractmethod
from bisect import insort
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from segfit.engine.findings import Column, Findings, Table
from segfit.engine.task import Task
from segfit.errors import SegFitError
from segfit.report.files import files_of, json_text
from segfit.runs.files import read_json
from segfit.system.files import atomic_write, reporting

METRICS, WORST, BEST = "metrics.json", "worst.png", "best.png"
_KIND = "evaluation"
_THREADS = 4
_BEST = 3  # samples at most in best.png


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
        self.names = (METRICS, "intervals.csv", *names)
        self.wrote: set[str] = set()  # of these, in this evaluation
        # Index of a sample → what it counts, whose sum over samples decides scores; and what says that the target is the same.
        self.counts: dict[int, NDArray[Any]] = {}
        self.truths: dict[int, NDArray[Any]] = {}
        # What is resampled, and its name for each entry of `counts`, where samples are not independent.
        self.units: tuple[str, Sequence[str]] | None = None
        there, kind = [name for name in self.names if os.path.lexists(path / name)], None
        with suppress(SegFitError):  # unreadable, so not ours
            kind = read_json(path / METRICS).get("kind")
        if there and kind != _KIND:
            raise SegFitError(
                f"out={path}: {', '.join(there)} in it would be replaced, and evaluate.py did not write "
                f"{'it' if len(there) == 1 else 'them'}. Choose another folder."
            )
        with reporting(f"out={path}: cannot be made"):
            path.mkdir(parents=True, exist_ok=True)

    def scores_of(self, sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        """Return the scores (R,) that sums (R, …) of `counts` decide, NaN where nothing does, of a task that fills them."""
        raise NotImplementedError

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
        """Return the files and folders that were written, not those that an earlier evaluation left there."""
        return [self.path / name for name in self.names if name in self.wrote]

    def write(self, path: Path, content: bytes) -> None:
        """Write a file, all or nothing; raise a SegFitError if it cannot be written."""
        with reporting(f"cannot write {path}"), atomic_write(path, sync=False) as file:
            file.write(content)
        self.wrote.add(path.relative_to(self.path).parts[0])


class PictureEvaluation(Evaluation):
    """An evaluation that writes pictures of each sample, and shows those with the lowest and the highest scores.

    `data` has the samples; if it is `predicted` alone, without targets, there are no scores. `kept` is how many of the worst
    are shown.
    """

    sample: str  # what a sample is called
    score: tuple[str, str, str]  # what ranks samples: its key in metrics.json, label and format

    def __init__(
        self, path: Path, task: Task, facts: Mapping[str, Any], names: Sequence[str],
        *, data: Any, predicted: bool, kept: int,
    ) -> None:  # fmt: skip
        super().__init__(path, task, facts, names)
        self.data, self.predicted, self.kept = data, predicted, kept
        self._pool = ThreadPoolExecutor(_THREADS)
        self._pending: deque[Future[None]] = deque()
        # (score, index), what is kept to draw it: of the worst samples and, with their scores negated, of the best; in order.
        self._worst: list[tuple[tuple[float, int], Any]] = []
        self._best: list[tuple[tuple[float, int], Any]] = []

    @abstractmethod
    def draw_cases(self, cases: Sequence[tuple[int, float, Any]]) -> bytes:
        """Return a PNG of samples: (index, score, what was kept of it)."""

    def keep(self, index: int, score: float, shown: Callable[[], Any]) -> None:
        """Keep what `shown` returns of a sample, if its score is among the lowest or highest so far; NaN never is."""
        if math.isnan(score) or not self.kept:
            return
        drawn = cache(shown)
        for cases, most, sign in ((self._worst, self.kept, 1), (self._best, _BEST, -1)):
            rank = (sign * score, index)
            if len(cases) < most or rank < cases[-1][0]:
                insort(cases, (rank, drawn()), key=itemgetter(0))
                del cases[most:]

    def name_of(self, index: int) -> str:
        """Return a sample's name; raise a SegFitError if it leads out of the folder."""
        name = PurePosixPath(self.data.id(index))
        if name.is_absolute() or ".." in name.parts:
            raise SegFitError(f"{name}: refused, the name leads out of {self.path}.")
        return f"{name}"

    def submit(self, index: int, write: Callable[[str], None]) -> None:
        """Call `write` with a sample's name in a thread: encoding releases Python's lock.

        Raises a SegFitError if an earlier one could not be written, or as `name_of`.
        """
        self._pending.append(self._pool.submit(write, self.name_of(index)))
        if len(self._pending) > 2 * _THREADS:  # no more pictures in memory than that
            self._pending.popleft().result()

    def finish(self, result: Findings) -> Findings:
        """Wait until all pictures are written; add the worst samples to the tables."""
        while self._pending:
            self._pending.popleft().result()
        if self.predicted:
            return Findings(seconds=result.seconds)
        key, label, form = self.score
        rows = [(self.data.id(index), score) for (score, index), _ in self._worst]
        if rows:
            worst = [(index, score, drawn) for (score, index), drawn in self._worst]
            best = [(index, -score, drawn) for (score, index), drawn in self._best]
            self.write(self.path / WORST, self.draw_cases(worst))
            self.write(self.path / BEST, self.draw_cases(best))
            columns = Column(self.sample), Column(label, form)
            table = Table("worst", f"Worst {self.sample}s", columns, rows)
            result = replace(result, tables=[*result.tables, table])
        listed = [{"id": name, key: score} for name, score in rows]
        return super().finish(replace(result, values={**result.values, "worst": listed}))

    def close(self) -> None:
        """Release the threads; what has not been begun is dropped."""
        self._pool.shutdown(cancel_futures=True)
