"""Batches on the device, copied while the device still works on the one before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

from segfit.data.collate import Batch
from segfit.data.gathering import GatheringLoader
from segfit.system.phases import phase


class DevicePrefetcher:
    """Yields a loader's batches on `device`, one ahead of what the device works on.

    The host queues a step's kernels and asks for the next batch long before they have run; that batch is copied
    meanwhile, on a stream of its own and from pinned memory.

    Args:
        loader: gives batches of host tensors.
        device: where they go; on the CPU they pass through.
        non_blocking: False makes the host wait for each copy, in the stream that the device works on, for comparison.

    Attributes:
        wait_seconds: wall-clock time spent waiting for the loader since this was last set to 0.
    """

    def __init__(
        self,
        loader: DataLoader[Any] | GatheringLoader,
        device: torch.device,
        *,
        non_blocking: bool = True,
    ) -> None:
        self.loader, self.device, self.non_blocking = loader, device, non_blocking
        self.wait_seconds = 0.0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        overlap = self.device.type == "cuda" and self.non_blocking
        stream = torch.cuda.Stream(self.device) if overlap else None
        start = time.perf_counter()
        for batch in self.loader:
            self.wait_seconds += time.perf_counter() - start
            with torch.cuda.stream(stream) if stream else nullcontext(), phase("copy"):
                moved = {
                    key: one.to(self.device, non_blocking=overlap) for key, one in batch.items()
                }
            if stream is not None:
                current = torch.cuda.current_stream(self.device)
                # The device, not the host, waits: work that is queued from here on comes after the copy.
                current.wait_stream(stream)
                for tensor in moved.values():
                    # The allocator must not hand this memory to the next copy before `current` is done with it.
                    tensor.record_stream(current)
            yield moved
            start = time.perf_counter()
