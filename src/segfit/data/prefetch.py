"""Batches on the device, copied while the device still works on the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import torch

from segfit.data.collate import Batch
from segfit.system.phases import phase


class Batches(Protocol):
    """A loader: batches of host tensors, again and again."""

    def __len__(self) -> int:
        """Return the number of batches."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches."""


class DevicePrefetcher:
    """Yields a loader's batches on `device`, one ahead of what the device works on.

    The host queues a step's kernels and comes back for the next batch long before they have run; the
    copy of that batch, on a stream of its own and from pinned memory, runs beside them.

    Args:
        loader: gives batches of host tensors.
        device: where they go; on the CPU they pass through.
        non_blocking: False makes the host wait for each copy, in the stream that the device works on, for comparison.

    Attributes:
        wait_seconds: wall-clock time spent waiting for the loader since this was last set to 0.
    """

    def __init__(self, loader: Batches, device: torch.device, *, non_blocking: bool = True) -> None:
        self.loader = loader
        self.device = device
        self.non_blocking = non_blocking
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        batches = self._timed()
        if self.device.type != "cuda" or not self.non_blocking:
            return self._moved(batches)
        return self._streamed(batches)

    def _timed(self) -> Iterator[Batch]:
        start = time.perf_counter()
        for batch in self.loader:
            self.wait_seconds += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def _moved(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            with phase("copy"):
                # synchronises, where the device is CUDA
                moved = {key: tensor.to(self.device) for key, tensor in batch.items()}
            yield moved

    def _streamed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device)
        for batch in batches:
            with torch.cuda.stream(stream), phase("copy"):
                moved = {
                    key: tensor.to(self.device, non_blocking=True) for key, tensor in batch.items()
                }
            current = torch.cuda.current_stream(self.device)
            # The device, not the host, waits: work that is queued from here on comes after the copy.
            current.wait_stream(stream)
            for tensor in moved.values():
                # The allocator must not hand this memory to the next copy before `current` is done with it.
                tensor.record_stream(current)
            yield moved
