"""Datasets → pinned batches, by worker processes, without a draw from the global random generators."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from segfit.data.bad_samples import SHARED_MEMORY_FULL, GuardedBatches, as_made, explain_deaths
from segfit.data.batches import Batch, Collate, stack
from segfit.errors import SegFitError
from segfit.system.hardware import one_blas_thread
from segfit.system.process import STOPPING


class Loader(DataLoader[Any]):
    """A DataLoader that raises a SegFitError, with the files at fault, whatever goes wrong.

    Iterating again while an iterator is unfinished is fine: what the workers had ready is dropped. A `batch_sampler`
    stays in this process, so that it can be set between iterations though the workers persist.

    Args:
        samples: a dataset that gets what the sampler yields, an index, or (index, seed); `where(index)` names the files.
        collate: samples → batch.
        device: where batches will go.
        workers: processes that make them; 0: this one.
        skip: is called with each sample that cannot be read, once. Training samples, asked for by (index, seed), are
            replaced, so that batches keep their size; others are left out of their batches. None: they are an error.
        share: other processes have the rest of the samples: it is no error if none of these can be read.
        prefetch: batches that each worker keeps ready.
        pin_memory: page-locked batches where they go to CUDA.
        persistent: keep the workers between epochs.
        how: DataLoader's own `batch_sampler`, or `batch_size` and, unless every sample is to come, `sampler`.
    """

    def __init__(
        self,
        samples: Any,
        collate: Collate,
        device: torch.device,
        workers: int = 0,
        skip: Callable[[str], None] | None = None,
        *,
        share: bool = False,
        prefetch: int = 4,
        pin_memory: bool = True,
        persistent: bool = True,
        **how: Any,
    ) -> None:
        one_blas_thread()
        try:
            rows = torch.full((workers, 2), -1)
            self.current = rows.share_memory_() if workers else rows
        except RuntimeError as error:
            raise SegFitError(SHARED_MEMORY_FULL) from error
        self.samples, self.skip, self.share = samples, skip, share
        self.left_out: dict[str, None] = {}  # what `skip` was called with, in order
        self.remarks: dict[int, str] = {}  # what is odd about samples that were made, by index
        super().__init__(
            GuardedBatches(samples, collate, skip is not None, self.current),
            collate_fn=as_made,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            persistent_workers=persistent and workers > 0,
            pin_memory=pin_memory and device.type == "cuda",
            worker_init_fn=init_worker,
            # Its own: else each epoch draws a number from the global one, and a resumed run has another dropout.
            generator=torch.Generator(),
            **how,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches.

        Raises a SegFitError if a sample cannot be made and is not to be skipped; if no sample at all can be read, and no
        other process has more of them; or if a worker was killed.
        """
        iterator: Any = None
        problems: Sequence[str] = ()
        skipped, nothing = list[str](), True
        try:
            iterator = self._started()
            for made in iterator:
                problems = made.problems
                if problems:
                    break
                for text in made.skipped:
                    if self.skip and text not in self.left_out:
                        self.left_out[text] = None
                        self.skip(text)
                self.remarks.update(made.remarks)
                if made.content is None:
                    skipped += made.skipped
                    continue
                nothing = False
                yield made.content
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # All but the first: the worker was killed while it handed a batch over.
            problems = self._explained(error, iterator)
            if not problems:
                raise
        if problems:
            # Persistent workers would wait for a next epoch that does not come.
            self._iterator = None
            del iterator
            raise SegFitError(list(dict.fromkeys(problems)))
        if nothing and skipped and not self.share:
            problem = "data.on_bad_sample=skip: none of the samples can be read."
            raise SegFitError([problem, *skipped[:5]])

    def _started(self) -> Iterator[Any]:
        """Start or restart the workers.

        torch's handler of SIGCHLD raises whatever the main process is doing, even half-way through an update.
        Without it, a worker's death is noticed when its batch is due, at most 5 s later.
        """
        main = threading.current_thread() is threading.main_thread()
        watched = main and hasattr(signal, "SIGCHLD")
        handler = signal.getsignal(signal.SIGCHLD) if watched else None
        # Blocked: before `init_worker`, a SIGTERM would kill a worker. This process gets afterwards what came meanwhile.
        can_block = hasattr(signal, "pthread_sigmask")  # not on Windows
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING) if can_block else ()
        try:
            iterator = super().__iter__()
        finally:
            if can_block:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if handler is not None:  # Python's own
            signal.signal(signal.SIGCHLD, handler)
        return iterator

    def _explained(self, error: Exception, iterator: Any) -> list[str]:
        """Return what an error of torch's means; empty where that is unknown."""
        text = str(error)
        if text.startswith("Too many open files"):
            return [
                "too many open files: each batch that waits takes some. Set loader.workers and loader.prefetch lower, "
                "or raise the limit (ulimit -n)."
            ]
        died = text.startswith("DataLoader worker")
        if not (self.num_workers and (died or isinstance(error, (OSError, EOFError)))):
            return []
        processes = getattr(iterator or self._iterator, "_workers", [])
        if not died:
            ends = {process.sentinel: process for process in processes}
            for end in multiprocessing.connection.wait(list(ends), timeout=5.0):
                ends[cast(int, end)].join(5.0)  # its files are closed a moment before it has ended
        dead = explain_deaths(processes, self.current, self.samples.where)
        return dead or ([f"{text.rstrip('.')}."] if died else [])


def init_worker(worker: int) -> None:  # noqa: ARG001
    """Prepare a worker process: one thread, a low priority, and signals are left to the main process.

    At equal priority, the threads of a model on the CPU would wait for the one whose core a worker takes, and a card for
    the thread that launches its kernels. `choose_workers` has figures.

    Ctrl-C, and Slurm's SIGTERM and SIGUSR, reach every process of the job. A worker that died of one would end the
    main process before its checkpoint is written.
    """
    torch.set_num_threads(1)
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)
    for number in STOPPING - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    sys.excepthook = _ignore_lost_connections
    parent = multiprocessing.parent_process()
    if parent is not None and sys.platform == "linux":
        # The handler is for the moment in which a second signal finds the waiting thread unblocked.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm, args=(parent.pid,), daemon=True).start()
    # A spawned worker does not inherit it. After the signals: OpenBLAS starts a thread here, which would take
    # the SIGTERM that ends this worker if it did not inherit that the signal is blocked.
    one_blas_thread()


def _ignore_lost_connections(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Print no traceback of the thread that hands batches over if the main process was killed meanwhile."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _wait_for_sigterm(parent: int | None) -> None:
    """End this process at a SIGTERM from `parent`, as multiprocessing sends it; ignore those from others."""
    if sys.platform == "linux":  # only there is the sender known
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)


def collate(samples: Sequence[Mapping[str, Any]], **fills: int) -> Batch:
    """Return samples as one batch, key by key, padded with `fills` (0) to its largest.

    Where only some have 16 bits, those of 8 are scaled to them. Raises as `stack`.
    """
    batch = {}
    for key in samples[0]:
        values = [torch.as_tensor(one[key]) for one in samples]
        if {value.dtype for value in values} == {torch.uint8, torch.uint16}:
            deep = [value.int() * (1 if value.dtype == torch.uint16 else 257) for value in values]
            values = [value.to(torch.uint16) for value in deep]
        batch[key] = stack(values, fills.get(key, 0))
    return batch
