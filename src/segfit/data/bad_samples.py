"""Samples that cannot be made: named, and replaced or left out where `data.on_bad_sample=skip` says so.

Errors are returned as values. One that is raised through torch's loader leaves a cycle that holds the workers, and
each of them then takes 5 s to end.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch.utils.data import Dataset

from segfit.data.batches import Collate
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
    skipped: Sequence[str] = ()  # what is wrong with those that were replaced or left out
    problems: Sequence[str] = ()  # what ends the run


@dataclass
class Skipping:
    """Logs the samples that a run skips, each once."""

    notice: Callable[[str], None]
    share: bool = False  # other processes have the rest of the samples: it is no error if none of these can be read
    logged: set[str] = field(default_factory=set, init=False)

    def log(self, messages: Sequence[str]) -> None:
        """Log what was not logged yet."""
        for message in messages:
            if message not in self.logged:
                self.logged.add(message)
                self.notice(message)


@dataclass
class GuardedDataset(Dataset[Made]):
    """A dataset that raises nothing.

    With `skip`, a training sample that cannot be read, asked for by (index, seed), is replaced by another one, which
    index and seed alone decide; one for evaluation, asked for by index, is left out. Without, it is a problem, as
    anything else that goes wrong always is. Workers record in `current` what they read.
    """

    dataset: Samples
    skip: bool
    current: CurrentSamples | None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Made:
        """Return what became of the sample."""
        trains = isinstance(key, tuple)
        instead = "another sample takes its place" if trains else "it is left out"
        skipped: list[str] = []
        for one in self._candidates(key):
            index = int(one[0] if trains else one)
            try:
                with self.current.reading(index) if self.current else nullcontext():
                    return Made(self.dataset[one], skipped)
            except SegFitError as error:
                if not self.skip:
                    return Made(None, problems=error.problems)
                skipped.append(f"{' '.join(error.problems)} data.on_bad_sample=skip: {instead}.")
            except Exception as error:
                return Made(None, problems=[_unexpected(self.dataset.where(index), error)])
        if not trains:
            return Made(None, skipped)
        problem = (
            f"data.on_bad_sample=skip: {len(skipped)} samples were tried, and none can be read."
        )
        return Made(None, problems=[problem, *skipped[:5]])

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


@dataclass
class GuardedCollate:
    """Makes batches of what became of samples; raises nothing."""

    collate: Collate

    def __call__(self, made: Sequence[Made]) -> Made:
        """Return what became of the batch."""
        skipped = [message for one in made for message in one.skipped]
        problems = [problem for one in made for problem in one.problems]
        samples = [one.content for one in made if one.content is not None]
        if problems or not samples:
            return Made(None, skipped, problems)
        try:
            return Made(self.collate(samples), skipped)
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return Made(None, skipped, [SHARED_MEMORY_FULL])


def _unexpected(where: str, error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"{where}: memory ran out while this was read. Set loader.workers lower, or cut large images into tiles."
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return (
        f"{where}: no sample can be made of this: {type(error).__name__}: {text} "
        f"({Path(place.filename).name}:{place.lineno})."
    )
