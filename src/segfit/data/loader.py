"""Datasets → pinned batches, by worker processes, without a draw from anybody's random numbers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from segfit.data.dataset import Batch, Sample, collate
from segfit.data.sampler import EpochSampler
from segfit.errors import SegFitError

_CAUGHT = "SegFitError in DataLoader worker"
_RAISED = "segfit.errors.SegFitError: "


class Loader(DataLoader[Sample]):
    """A DataLoader whose failures are told in the words of this project.

    Iterating again while an iterator is unfinished is fine: what the workers had ready is dropped.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        """Yield batches.

        Raises:
            SegFitError: that of a dataset, as it was raised in the worker; or if a worker was killed.
        """
        iterator = super().__iter__()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except SegFitError as error:
                raise _as_raised(error) from None
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise SegFitError(
                    f"{str(error).rstrip('.')}. Most likely memory ran out, shared memory (/dev/shm) above all. Set "
                    "loader.workers and loader.prefetch lower (workers=0 needs none), or give the "
                    "container more (docker run --shm-size)."
                ) from error
            yield batch


def _as_raised(error: SegFitError) -> SegFitError:
    """Return the dataset's own error from one that came out of a worker with its traceback in it."""
    text = str(error)
    if _CAUGHT not in text or _RAISED not in text:
        return error
    return SegFitError(text.rpartition(_RAISED)[2].strip().splitlines())


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


def _obey(parent: int | None) -> None:
    """End this process at a SIGTERM from `parent`, as multiprocessing sends it; pass over others'."""
    if sys.platform == "linux":  # only there is the sender known
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)


def _loader(
    dataset: Dataset[Sample], workers: int, prefetch: int, persistent: bool, pin: bool, **how: Any
) -> Loader:
    return Loader(
        dataset,
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        persistent_workers=persistent and workers > 0,
        pin_memory=pin,
        worker_init_fn=init_worker,
        # Its own: by default each epoch draws a number from the global generator, and a run that was
        # resumed in the middle of an epoch would see other dropout than one that was not.
        generator=torch.Generator(),
        **how,
    )


def train_loader(
    dataset: Dataset[Sample],
    sampler: EpochSampler,
    *,
    device: torch.device,
    workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool = True,
    persistent: bool = True,
) -> Loader:
    """Return a loader of training batches; `sampler.set_epoch` says which ones the next iteration gives.

    Args:
        dataset: gets (index, seed).
        sampler: gives the batches; it stays in this process, so that it can be set between iterations
            though the workers persist.
        device: where batches will go; only those for CUDA are pinned.
        workers: processes; 0: this one.
        prefetch: batches that each worker keeps ready.
        pin_memory: page-locked batches where `device` is CUDA.
        persistent: keep the workers between epochs.
    """
    pin = pin_memory and device.type == "cuda"
    return _loader(dataset, workers, prefetch, persistent, pin, batch_sampler=sampler)


def eval_loader(
    dataset: Dataset[Sample],
    batch_size: int,
    *,
    device: torch.device,
    workers: int = 0,
    prefetch: int = 4,
    pin_memory: bool = True,
    persistent: bool = True,
) -> Loader:
    """Return a loader of every sample once, in order. Arguments as `train_loader`."""
    pin = pin_memory and device.type == "cuda"
    return _loader(dataset, workers, prefetch, persistent, pin, batch_size=batch_size)
