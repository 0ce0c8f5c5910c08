"""Samples that cannot be made: named, and replaced or left out where `data.on_bad_sample=skip` says so.

A worker that was killed cannot say over which one: what it reads is in memory that the main process shares.

Errors are returned as values. One that is raised through torch's loader leaves a cycle that holds the workers, and
each of them then takes 5 s to end.
"""

import os
import random
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, get_worker_info

from segfit.data.batches import Collate
from segfit.errors import SegFitError

_ATTEMPTS = 100  # other samples that are tried in the place of one
_LESS = "Set loader.workers or loader.prefetch lower (loader.workers=0 needs none)"
SHARED_MEMORY_FULL = (
    f"Shared memory (/dev/shm) is too small for the batches that workers keep ready. {_LESS}, or give the container "
    "more (docker run --shm-size)."
)
_DECODER = "A decoder crashed, most likely over a damaged file: replace it or delete it."
_MEANINGS = {
    "SIGKILL": f"Most likely memory ran out, the machine's or the container's. {_LESS}, or batch_size.",
    "SIGBUS": SHARED_MEMORY_FULL,
    "SIGSEGV": _DECODER,
    "SIGFPE": _DECODER,
    "SIGABRT": "A library gave up; what it printed says why.",
}


class Made(NamedTuple):
    """What became of a batch."""

    content: Any  # None if there is nothing in it
    skipped: Sequence[str]  # what is wrong with samples that were replaced or left out
    problems: Sequence[str]  # what ends the run
    remarks: Mapping[int, str] = {}  # what is odd about samples that were made, by index


@dataclass
class GuardedBatches(Dataset[Any]):
    """Makes batches of a dataset's samples, and raises nothing.

    With `skip`, a training sample that cannot be read, asked for by (index, seed), is replaced by another one, which
    index and seed alone decide; one for evaluation, asked for by index, is left out. Without, it is a problem, as
    anything else that goes wrong always is.
    """

    # `where(index)` names the files behind a sample; `remarks`, if it has them: what is odd about samples, by index
    dataset: Any
    collate: Collate
    skip: bool
    # (workers, 2), shared: process and index of the sample that each worker reads, or -1
    current: torch.Tensor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Any]) -> Made:
        """Return what became of a batch."""
        samples: list[Any] = []
        skipped: list[str] = []
        problems: list[str] = []
        for key in keys:
            try:
                samples += self._made(key, skipped)
            except SegFitError as error:
                problems += error.problems
        self._note(-1)
        if problems or not samples:
            return Made(None, skipped, problems)
        odd = getattr(self.dataset, "remarks", {})
        remarks = {key: odd.pop(key) for key in keys if key in odd}
        try:
            return Made(self.collate(samples), skipped, [], remarks)
        except RuntimeError as error:
            if "shared memory" not in str(error):
                raise
            return Made(None, skipped, [SHARED_MEMORY_FULL])

    def _made(self, key: Any, skipped: list[str]) -> list[Any]:
        """Return a sample, or the one in its place, if there is one; add to `skipped`. Raises a SegFitError."""
        trains, failed = isinstance(key, tuple), list[str]()
        instead = "another sample takes its place" if trains else "it is left out"
        for one in self._candidates(key):
            index = int(one[0] if trains else one)
            self._note(index)
            try:
                sample = self.dataset[one]
                skipped += failed
                return [sample]
            except SegFitError as error:
                if not self.skip:
                    raise
                failed.append(f"{' '.join(error.problems)} data.on_bad_sample=skip: {instead}.")
            except Exception as error:
                raise SegFitError(_unexpected(self.dataset.where(index), error)) from error
        if trains:
            problem = f"data.on_bad_sample=skip: {len(failed)} samples tried, none can be read."
            raise SegFitError([problem, *failed[:5]])
        skipped += failed
        return []

    def _note(self, index: int) -> None:
        if worker := get_worker_info():
            self.current[worker.id] = torch.tensor([os.getpid(), index])

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


def as_made(made: Any) -> Any:
    """Return a batch of `GuardedBatches` as it is."""
    return made


def _unexpected(where: str, error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"{where}: memory ran out while this was read. Set loader.workers lower, or cut large images into tiles."
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return (
        f"{where}: no sample can be made of this: {type(error).__name__}: {text} "
        f"({Path(place.filename).name}:{place.lineno})."
    )


def explain_deaths(
    processes: Sequence[BaseProcess], current: torch.Tensor, where: Callable[[int], str]
) -> list[str]:
    """Return why the workers that are dead died, in the workers' order; `where` gives the files of an index.

    `current` is what `GuardedBatches` recorded.
    """
    dead = []
    for worker, process in enumerate(processes):
        if process.is_alive():
            continue
        code = process.exitcode or 0
        what = f"the data worker (pid {process.pid})"
        pid, index = current[worker].tolist()
        read = index if pid == process.pid else -1
        what = (
            f"{where(read)}: {what} that read this"
            if read >= 0
            else f"{what}, between two samples,"
        )
        if code >= 0:
            dead.append(f"{what} ended with exit code {code}. What it printed says why.")
            continue
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        meaning = _MEANINGS.get(name, "Another process sent it.")
        dead.append(f"{what} was killed by {name}. {meaning}")
    return dead
