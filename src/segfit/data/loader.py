"""Datasets → pinned batches, by worker processes, without a draw from anybody's random numbers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from segfit.data.cores import one_blas_thread
from segfit.data.dataset import Sample, collate
from segfit.data.sampler import EpochSampler
from segfit.errors import SegFitError

_CAUGHT = "SegFitError in DataLoader worker"
_RAISED = "segfit.errors.SegFitError: "


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
    """

    def check_worker_number_rationality(self) -> None:
        """Say nothing: how many workers there are was chosen (`choose_workers`), or somebody asked for them."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches.

        Raises:
            SegFitError: that of a dataset, as it was raised in the worker; or if a worker was killed.
        """
        iterator = super().__iter__()
        while True:
            problems: list[str] = []
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except SegFitError as error:
                problems = _as_raised(error)
                # torch leaves a cycle of error and frames that holds the iterator. One that ends in the garbage
                # collector cannot reach its workers any more and waits 5 s for them to end.
                error.__traceback__ = None
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise SegFitError(
                    f"{str(error).rstrip('.')}. Most likely memory ran out, shared memory (/dev/shm) above all. Set "
                    "loader.workers and loader.prefetch lower (workers=0 needs none), or give the "
                    "container more (docker run --shm-size)."
                ) from error
            if problems:
                del iterator  # which the traceback would hold
                raise SegFitError(
                    problems
                )  # out of the handler, whose error would come along as context
            yield batch


def _as_raised(error: SegFitError) -> list[str]:
    """Return the dataset's own problems from an error that came out of a worker with its traceback in it."""
    text = str(error)
    if _CAUGHT not in text or _RAISED not in text:
        return error.problems
    return text.rpartition(_RAISED)[2].strip().splitlines()


def init_worker(worker: int) -> None:  # noqa: ARG001
    """Prepare a worker process: one thread, and signals are the main process's to handle.

    Ctrl-C, and Slurm's SIGTERM, reach every process of the job. A worker that died of it would take the
    main process down before its checkpoint is written.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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


def _obey(parent: int | None) -> None:
    """End this process at a SIGTERM from `parent`, as multiprocessing sends it; pass over others'."""
    if sys.platform == "linux":  # only there is the sender known
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)


def _loader(
    dataset: Dataset[Any], device: torch.device, options: LoaderOptions, **how: Any
) -> Loader:
    one_blas_thread()
    return Loader(
        dataset,
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
    dataset: Dataset[Sample],
    sampler: EpochSampler,
    device: torch.device,
    options: LoaderOptions = LoaderOptions(),
) -> Loader:
    """Return a loader of training batches; `sampler.set_epoch` says which ones the next iteration gives.

    Args:
        dataset: gets (index, seed).
        sampler: gives the batches; it stays in this process, so that it can be set between iterations
            though the workers persist.
        device: where batches will go; only those for CUDA are pinned.
        options: who makes them.
    """
    return _loader(dataset, device, options, collate_fn=collate, batch_sampler=sampler)


def eval_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    device: torch.device,
    options: LoaderOptions = LoaderOptions(),
) -> Loader:
    """Return a loader of every sample once, in order. Arguments as `train_loader`."""
    return _loader(dataset, device, options, collate_fn=collate, batch_size=batch_size)


def item_loader(dataset: Dataset[Any], indices: Sequence[int], size: int, workers: int) -> Loader:
    """Return a loader of `dataset[index]` for every index, in lists of `size`, as the dataset made them."""
    options = LoaderOptions(workers, prefetch=2, persistent=False)
    how: dict[str, Any] = {"sampler": indices, "batch_size": size}
    return _loader(dataset, torch.device("cpu"), options, collate_fn=list, **how)
