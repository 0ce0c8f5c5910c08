"""What workers are reading, for the one that is killed and cannot say so any more."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess

import torch
from torch.utils.data import get_worker_info

_LESS = "Set loader.workers or loader.prefetch lower (loader.workers=0 needs none)"
SHARED_MEMORY_FULL = (
    f"Shared memory (/dev/shm) is too small for the batches that workers keep ready. {_LESS}, or give the container "
    "more (docker run --shm-size)."
)
_MEANINGS = {
    "SIGKILL": f"Most likely memory ran out, the machine's or the container's. {_LESS}, or batch_size.",
    "SIGBUS": SHARED_MEMORY_FULL,
    "SIGSEGV": "A decoder crashed, most likely over a damaged file: replace it or delete it.",
    "SIGFPE": "A decoder crashed, most likely over a damaged file: replace it or delete it.",
    "SIGABRT": "A library gave up; what it printed says why.",
}


class Watch:
    """The index that each worker reads, in memory that the main process shares.

    Args:
        workers: how many there are.

    Raises:
        RuntimeError: if shared memory has no room.
    """

    def __init__(self, workers: int) -> None:
        # process, index (-1: none)
        self._rows = torch.full((workers, 2), -1).share_memory_()

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        """Note, in a worker, that it reads the image `index`."""
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
        """Return what a worker reads, or read when it ended; None: nothing."""
        process, index = self._rows[worker].tolist()
        return index if process == pid and index >= 0 else None


def explain_death(process: BaseProcess, read: str | None) -> str:
    """Return why a worker ended, in words.

    Args:
        process: that ended.
        read: the files that it was reading, or None.
    """
    code = process.exitcode or 0
    what = f"the data worker (pid {process.pid})"
    what = f"{read}: {what} that read this" if read else f"{what}, between two images,"
    if code >= 0:
        return f"{what} ended with exit code {code}. What it printed says why."
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{what} was killed by {name}. {_MEANINGS.get(name, 'Somebody sent it.')}"


def dead_workers(
    processes: list[BaseProcess], watch: Watch, where: Callable[[int], str]
) -> list[str]:
    """Return why each worker that is dead ended.

    Args:
        processes: the workers, in their order.
        watch: what they read.
        where: index → files.
    """
    problems = []
    for worker, process in enumerate(processes):
        if not process.is_alive():
            index = watch.index_of(worker, process.pid)
            problems.append(explain_death(process, None if index is None else where(index)))
    return problems
