"""The folder of one evaluation: metrics.json, tables and figures; a task adds what it keeps of its predictions.

And how sure its scores are: bootstrap intervals, and two models on the same samples; docs/metrics.md is the contract. What is
resampled are units: samples, or groups of samples that are not independent. Each has counts, and the sum of counts (N, …) over
units decides the scores: `scores` maps sums (R, …) to values (R,) by name, NaN where nothing decides them.
"""

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

from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.engine.task import Task
from segfit.errors import SegFitError
from segfit.report.files import files_of, json_text
from segfit.runs.files import read_json
from segfit.system.files import atomic_write, reporting

Counts = NDArray[np.float64]
Scores = Callable[[Counts], Mapping[str, Counts]]
Interval = tuple[float, float]

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
        """Return the scores (R,) of sums (R, …) of `counts`, NaN where one is undefined; for tasks that fill `counts`."""
        raise NotImplementedError

    def write_metrics(self, values: Mapping[str, Any]) -> None:
        """Write metrics.json; written first, it marks the folder as an evaluation's. Raises as `write`."""
        self.write(self.path / METRICS, (json_text({"kind": _KIND, **values}) + "\n").encode())

    def finish(self, result: Findings) -> Findings:
        """Write what is left, a CSV file a table and a PNG file a figure; return what is shown. Raises as `write`."""
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


def intervals(counts: Counts, scores: Scores, resamples: int, seed: int = 0) -> dict[str, Interval]:
    """Return 95 % percentile intervals of the scores (Efron and Tibshirani, 1993); NaN with fewer than two units."""
    drawn = scores(_resampled(counts, resamples, seed))
    return {name: _interval(values) for name, values in drawn.items()}


def compare(
    first: Counts, second: Counts, scores: Scores, resamples: int, seed: int = 0
) -> dict[str, tuple[float, Interval, float]]:
    """Return by how much the scores of `first` exceed those of `second`, the interval of that, and its two-sided p.

    The units are the same, and are resampled together. p is of the permutation test that swaps the two models in a random
    half of the units.
    """
    both, random = np.stack([first, second], 1), np.random.default_rng(seed)
    sums, change = both.sum(0), second - first
    swaps = [_sum(random.integers(2, size=len(change)), change) for _ in range(resamples)]
    moved = np.stack(swaps)

    def differences(sums: Counts) -> dict[str, Counts]:
        ours, theirs = scores(sums[:, 0]), scores(sums[:, 1])
        return {name: ours[name] - theirs[name] for name in ours}

    drawn = differences(_resampled(both, resamples, seed))
    swapped = differences(np.stack([sums[0] + moved, sums[1] - moved], 1))
    found = {}
    for name, (value,) in differences(sums[None]).items():
        # Swaps that change nothing give the same but for rounding.
        as_large = np.abs(swapped[name]) >= abs(value) * (1 - 1e-9) - 1e-12
        p = (as_large.sum() + 1) / (resamples + 1) if np.isfinite(value) else np.nan
        found[name] = float(value), _interval(drawn[name]), float(p)
    return found


def with_intervals(
    result: Findings, counts: Sequence[Counts], scores: Scores, resamples: int, what: str
) -> Findings:
    """Return findings with scores, their intervals, and of two models their differences; units are called `what`."""
    found = {key: float(value) for key, (value,) in scores(counts[0].sum(0)[None]).items()}
    result = replace(result, scores={**found, **result.scores})
    if not resamples:
        return result
    names = ["score", "value", "low", "high"]
    known, rows = intervals(counts[0], scores, resamples), dict[str, list[Cell]]()
    for key, interval in known.items():
        rows[key] = [key, result.scores[key], *interval]
    title = f"95 % intervals by {resamples} resamples of {len(counts[0])} {what}"
    values = {"intervals": known, "units": len(counts[0])}
    if len(counts) > 1:
        title += "; the difference from the other run, and its p"
        names += ["other", "difference", "from", "to", "p"]
        compared = compare(counts[0], counts[1], scores, resamples)
        theirs = scores(counts[1].sum(0)[None])
        for key, row in rows.items():
            difference, interval, p = compared[key]
            row += [float(theirs[key][0]), difference, *interval, p]
        values["compared"] = {
            key: dict(zip(names[4:], row[4:], strict=True)) for key, row in rows.items()
        }
    columns = [Column(name, ".4f") for name in names]
    table = Table("intervals", title, columns, [*rows.values()])
    return replace(result, tables=[*result.tables, table], values={**result.values, **values})


def summed(counts: Mapping[int, NDArray[Any]], groups: Sequence[str]) -> Counts:
    """Return the counts (N, …) of groups, from those of samples and each sample's group, by index."""
    names, where = np.unique([groups[index] for index in sorted(counts)], return_inverse=True)
    each = np.stack([counts[index] for index in sorted(counts)])
    total = np.zeros((len(names), *each.shape[1:]))
    np.add.at(total, where, each)
    return total


def _resampled(counts: Counts, resamples: int, seed: int) -> Counts:
    """Return sums (R, …) of units drawn with replacement, one draw after the other: all at once would not fit."""
    random, count = np.random.default_rng(seed), len(counts)
    if count < 2:
        return np.full((1, *counts.shape[1:]), np.nan)
    draws = (random.integers(count, size=count) for _ in range(resamples))
    return np.stack([_sum(np.bincount(draw, minlength=count), counts) for draw in draws])


def _sum(weights: NDArray[np.int64], counts: Counts) -> Counts:
    return np.asarray(np.tensordot(weights.astype(np.float64), counts, 1))


def _interval(values: Counts) -> Interval:
    known = values[np.isfinite(values)]
    low, high = np.quantile(known, (0.025, 0.975)).tolist() if len(known) else (np.nan, np.nan)
    return low, high
