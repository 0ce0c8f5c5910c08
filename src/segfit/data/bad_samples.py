"""Samples that cannot be made: named, and replaced or left out where `data.on_bad_sample=skip` says so.

Errors are returned as values. One that is raised through torch's loader leaves a cycle that holds the workers, and
each of them then takes 5 s to end.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Dataset

from segfit.data.collate import Collate
from segfit.data.worker_deaths import SHARED_MEMORY_FULL, CurrentSamples
from segfit.errors import SegFitError

_ATTEMPTS = 100  # other samples that are tried in the place of one


class Samples(Protocol):
    """A dataset as loaders take it."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def where(self, index: int) -> str:
        """Return the files behind a sample, for messages."""

    def __getitem__(self, key: Any) -> Any:
        """Return the sample for an index, or for (index, seed)."""


class Made(NamedTuple):
    """What became of a sample, or of a batch of them."""

    content: Any  # the sample or batch, or None
    skipped: list[
        str
    ]  # what is wrong with samples that were replaced or left out, one message a sample
    problems: list[str]  # what ends the run


class Skipping:
    """Logs the samples that a run skips, each once.

    Args:
        notice: called with a line each.
        share: other processes have the rest of the samples, so that it is no error if none of these can be read.
    """

    def __init__(self, notice: Callable[[str], None], *, share: bool = False) -> None:
        self.notice = notice
        self.share = share
        self.logged: set[str] = set()

    def log(self, messages: Sequence[str]) -> None:
        """Log what was not logged yet."""
        for message in messages:
            if message not in self.logged:
                self.logged.add(message)
                self.notice(message)


class GuardedDataset(Dataset[Made]):
    """A dataset that raises nothing.

    Args:
        dataset: makes the samples.
        skip: a training sample that cannot be read, asked for by (index, seed), is replaced by another one,
            which index and seed alone decide; one for evaluation, asked for by index, is left out. False: it is a
            problem, as anything else that goes wrong always is.
        current: where workers record what they read.
    """

    def __init__(self, dataset: Samples, *, skip: bool, current: CurrentSamples | None) -> None:
        self.dataset, self.skip, self.current = dataset, skip, current

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Made:
        """Return what became of the sample."""
        skipped: list[str] = []
        for one in self._candidates(key):
            try:
                with self.current.reading(_index(one)) if self.current else nullcontext():
                    return Made(self.dataset[one], skipped, [])
            except SegFitError as error:
                if not self.skip:
                    return Made(None, [], error.problems)
                instead = (
                    "another sample takes its place" if isinstance(key, tuple) else "it is left out"
                )
                skipped.append(f"{' '.join(error.problems)} data.on_bad_sample=skip: {instead}.")
            except Exception as error:
                return Made(None, [], [_unexpected(self.dataset.where(_index(one)), error)])
        if isinstance(key, tuple):
            problem = (
                f"data.on_bad_sample=skip: {len(skipped)} samples were tried, and none can be read."
            )
            return Made(None, [], [problem, *skipped[:5]])
        return Made(None, skipped, [])

    def _candidates(self, key: Any) -> Iterator[Any]:
        yield key
        if not (self.skip and isinstance(key, tuple)):
            return
        index, seed = key
        count = len(self.dataset)
        draw = random.Random((seed << 64) + index)
        for other in draw.sample(range(count), min(count, _ATTEMPTS)):
            if other != index:
                yield other, seed


class GuardedCollate:
    """Makes batches of what became of samples; raises nothing."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, made: Sequence[Made]) -> Made:
        """Return what became of the batch."""
        skipped = [message for one in made for message in one.skipped]
        problems = [problem for one in made for problem in one.problems]
        samples = [one.content for one in made if one.content is not None]
        if problems or not samples:
            return Made(None, skipped, problems)
        try:
            return Made(self.collate(samples), skipped, [])
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return Made(None, skipped, [SHARED_MEMORY_FULL])


def _index(key: Any) -> int:
    return int(key[0] if isinstance(key, tuple) else key)


def _unexpected(where: str, error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"{where}: memory ran out while this was read. Set loader.workers lower, or cut large images into tiles."
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return (
        f"{where}: no sample can be made of this: {type(error).__name__}: {text} "
        f"({Path(place.filename).name}:{place.lineno})."
    )
