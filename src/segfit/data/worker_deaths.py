"""Why a data worker died, and over which sample: a killed process cannot say so itself."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import get_worker_info

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


class CurrentSamples:
    """The index of the sample that each worker reads, in memory that the main process shares.

    Raises:
        RuntimeError: if shared memory has no room.
    """

    def __init__(self, workers: int) -> None:
        self._rows = torch.full((workers, 2), -1).share_memory_()  # process, index (-1: none)

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Record, in a worker, that it reads the sample `index`."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        row = self._rows[worker.id].numpy()
        row[:] = os.getpid(), index
        try:
            yield
        finally:
            row[1] = -1

    def index_of(self, worker: int, pid: int | None) -> int | None:
        """Return the index that a worker reads, or read when it died; None: none."""
        process, index = self._rows[worker].tolist()
        return index if process == pid and index >= 0 else None


def explain_dead_workers(
    processes: Sequence[BaseProcess], current: CurrentSamples, where: Callable[[int], str]
) -> list[str]:
    """Return why each of the workers, in their order, that is dead died; `where` gives the files of an index."""
    dead = []
    for worker, process in enumerate(processes):
        if process.is_alive():
            continue
        code = process.exitcode or 0
        what = f"the data worker (pid {process.pid})"
        index = current.index_of(worker, process.pid)
        idle = f"{what}, between two samples,"
        what = idle if index is None else f"{where(index)}: {what} that read this"
        if code >= 0:
            dead.append(f"{what} ended with exit code {code}. What it printed says why.")
            continue
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        meaning = _MEANINGS.get(name, "Another process sent it.")
        dead.append(f"{what} was killed by {name}. {meaning}")
    return dead
