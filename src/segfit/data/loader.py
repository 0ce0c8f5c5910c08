"""Datasets → pinned batches, by worker processes, without a draw from anybody's random numbers."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from segfit.data.bad_samples import GuardedCollate, GuardedDataset, Made, Samples, Skipping
from segfit.data.sampler import EpochSampler
from segfit.data.watching import SHARED_MEMORY_FULL, Watch, dead_workers
from segfit.errors import SegFitError
from segfit.system.cores import one_blas_thread
from segfit.tasks.segmentation.data.collate import collate


@dataclass(frozen=True)
class LoaderOptions:
    """Who makes batches, and how many wait.

    Args:
        workers: processes; 0: this one.
        prefetch: batches that each worker keeps ready.
        pin_memory: page-locked batches where they go to CUDA.
        persistent: keep the workers between epochs.
    """

    workers: int = 0
    prefetch: int = 4
    pin_memory: bool = True
    persistent: bool = True


class Loader(DataLoader[Any]):
    """A DataLoader whose failures are told in the words of this project.

    Iterating again while an iterator is unfinished is fine: what the workers had ready is dropped.

    Args:
        samples: makes the samples.
        collate: samples → batch.
        skipping: told which images cannot be read, and are done without; None: they are an error.
        how: DataLoader's own arguments.
    """

    def __init__(
        self,
        samples: Samples,
        collate: Callable[[Sequence[Any]], Any],
        skipping: Skipping | None = None,
        **how: Any,
    ) -> None:
        try:
            self.watch = Watch(how["num_workers"]) if how.get("num_workers") else None
        except RuntimeError as error:
            raise SegFitError(SHARED_MEMORY_FULL) from error
        self.samples = samples
        self.skipping = skipping
        guarded = GuardedDataset(samples, skip=skipping is not None, watch=self.watch)
        super().__init__(guarded, collate_fn=GuardedCollate(collate), **how)

    def check_worker_number_rationality(self) -> None:
        """Say nothing: how many workers there are was chosen (`choose_workers`), or somebody asked for them."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches.

        Raises:
            SegFitError: if a sample cannot be made, and the run does not do without; if no sample at all can be
                read, by no other process either; or if a worker was killed.
        """
        skipped: list[str] = []
        nothing = True
        for made in self._made():
            if self.skipping is not None:
                self.skipping.tell(made.skipped)
            if made.content is None:
                skipped += made.skipped
                continue
            nothing = False
            yield made.content
        alone = self.skipping is None or not self.skipping.share
        if alone and nothing and skipped:
            raise SegFitError(
                ["data.on_bad_sample=skip: none of the images can be read.", *skipped[:5]]
            )

    def _made(self) -> Iterator[Made]:
        """Yield what became of each batch; the workers end with an error."""
        iterator: Any = None
        problems: list[str] = []
        try:
            iterator = self._started()
            for made in iterator:
                problems = made.problems
                if problems:
                    break
                yield made
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # All but the first: the worker was killed in the midst of handing a batch over.
            problems = self._explained(error, iterator)
            if not problems:
                raise
        if problems:
            # Persistent workers would wait for a next epoch that does not come.
            self._iterator = None
            del iterator
            raise SegFitError(list(dict.fromkeys(problems)))

    def _started(self) -> Iterator[Made]:
        """Start or restart the workers.

        torch handles SIGCHLD by raising, in the midst of whatever the main process does, even a half-made
        update. Without, it notices a worker's death when it waits for it, at most 5 s later.
        """
        if (
            not hasattr(signal, "SIGCHLD")
            or threading.current_thread() is not threading.main_thread()
        ):
            with _signals_held_back():
                return super().__iter__()
        handler = signal.getsignal(signal.SIGCHLD)
        with _signals_held_back():
            iterator = super().__iter__()
        if handler is not None:  # Python's own
            signal.signal(signal.SIGCHLD, handler)
        return iterator

    def _explained(self, error: Exception, iterator: Any) -> list[str]:
        """Return what an error of torch's means, or nothing."""
        text = str(error)
        if text.startswith("Too many open files"):
            return [
                "too many open files: each batch that waits takes some. Set loader.workers and loader.prefetch lower, "
                "or raise the limit (ulimit -n)."
            ]
        told = text.startswith("DataLoader worker")
        if self.watch is None or not (told or isinstance(error, (OSError, EOFError))):
            return []
        processes = getattr(iterator or self._iterator, "_workers", [])
        if not told:
            ends = {process.sentinel: process for process in processes}
            for end in multiprocessing.connection.wait(list(ends), timeout=1.0):
                ends[cast(int, end)].join(1.0)  # its files are closed a moment before it has ended
        dead = dead_workers(processes, self.watch, self.samples.where)
        return dead or ([f"{text.rstrip('.')}."] if told else [])


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let workers be born with the signals blocked that `init_worker` takes care of.

    torch lets a worker die of a SIGTERM that comes before that. This process gets what came meanwhile afterwards.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def init_worker(worker: int) -> None:  # noqa: ARG001
    """Prepare a worker process: one thread, and signals are the main process's to handle.

    Ctrl-C, and Slurm's SIGTERM and SIGUSR, reach every process of the job. A worker that died of it would take the
    main process down before its checkpoint is written.
    """
    torch.set_num_threads(1)
    for name in ("SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):  # only the first is on Windows
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    sys.excepthook = _pass_over_lost_connections
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform == "linux":
        # The handler is for the moment in which a second signal finds the waiting thread unblocked.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(parent.pid,), daemon=True).start()
    # A spawned worker does not inherit it. After the signals: OpenBLAS starts a thread here, which would take
    # the SIGTERM that ends this worker if it did not inherit that the signal is blocked.
    one_blas_thread()


def init_worker_beside_model(worker: int) -> None:
    """Prepare a worker that shares the cores with the model: it takes what the model leaves.

    At equal priority a worker takes the core of one of the model's threads, and the others wait for that
    thread in every operation. See `choose_workers` for what it is worth.
    """
    init_worker(worker)
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)


def _pass_over_lost_connections(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Show no traceback of the thread that hands batches over, where the main process was killed meanwhile."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _obey(parent: int | None) -> None:
    """End this process at a SIGTERM from `parent`, as multiprocessing sends it; pass over others'."""
    if sys.platform == "linux":  # only there is the sender known
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)


def _loader(
    samples: Samples,
    collate: Callable[[Sequence[Any]], Any],
    device: torch.device,
    options: LoaderOptions,
    skipping: Skipping | None,
    **how: Any,
) -> Loader:
    one_blas_thread()
    return Loader(
        samples,
        collate,
        skipping,
        num_workers=options.workers,
        prefetch_factor=options.prefetch if options.workers else None,
        persistent_workers=options.persistent and options.workers > 0,
        pin_memory=options.pin_memory and device.type == "cuda",
        worker_init_fn=init_worker if device.type == "cuda" else init_worker_beside_model,
        # Its own: by default each epoch draws a number from the global generator, and a run that was
        # resumed in the middle of an epoch would see other dropout than one that was not.
        generator=torch.Generator(),
        **how,
    )


def train_loader(
    samples: Samples,
    sampler: EpochSampler,
    device: torch.device,
    options: LoaderOptions = LoaderOptions(),
    skipping: Skipping | None = None,
) -> Loader:
    """Return a loader of training batches; `sampler.set_epoch` says which ones the next iteration gives.

    Args:
        samples: a dataset that gets (index, seed).
        sampler: gives the batches; it stays in this process, so that it can be set between iterations
            though the workers persist.
        device: where batches will go; only those for CUDA are pinned.
        options: who makes them.
        skipping: told which images cannot be read; others take their places, so that batches keep their size.
            None: they are an error.
    """
    return _loader(samples, collate, device, options, skipping, batch_sampler=sampler)


def eval_loader(
    samples: Samples,
    batch_size: int,
    device: torch.device,
    options: LoaderOptions = LoaderOptions(),
    skipping: Skipping | None = None,
    indices: Sequence[int] | None = None,
) -> Loader:
    """Return a loader of every sample once, in order.

    Args:
        samples: a dataset that gets an index.
        batch_size: images a batch.
        device: as `train_loader`.
        options: as `train_loader`.
        skipping: told which images cannot be read, and are left out of their batches; None: they are an error.
        indices: of those samples alone; None: all.
    """
    how: dict[str, Any] = {"sampler": indices, "batch_size": batch_size}
    return _loader(samples, collate, device, options, skipping, **how)


def item_loader(samples: Samples, indices: Sequence[int], size: int, workers: int) -> Loader:
    """Return a loader of `samples[index]` for every index, in lists of `size`, as they were made."""
    options = LoaderOptions(workers, prefetch=2, persistent=False)
    how: dict[str, Any] = {"sampler": indices, "batch_size": size}
    return _loader(samples, list, torch.device("cpu"), options, None, **how)
