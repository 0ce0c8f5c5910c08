"""Batches that a dataset makes as a whole, where its data lie: nothing to read, to collate or to send between processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.data.collate import Batch
from segfit.data.sampler import EpochSampler

Indices: TypeAlias = Sequence[int] | NDArray[np.int64]


@runtime_checkable
class GatheringDataset(Protocol):
    """A dataset that makes batches; each depends on its indices alone."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def batch(self, indices: Indices, device: torch.device) -> Batch:
        """Return some samples as one batch, on the device, or on the host in memory that can be copied from there."""


class GatheringLoader:
    """Yields the batches of a dataset; takes the place of a `Loader`.

    Args:
        samples: makes the batches.
        device: where they will go.
        batch_sampler: gives the indices of the batches of its epoch.
        sampler: or indices in order, in batches of `batch_size`.
    """

    num_workers = 0

    def __init__(
        self,
        samples: GatheringDataset,
        device: torch.device,
        *,
        batch_sampler: EpochSampler | None = None,
        sampler: Sequence[int] = (),
        batch_size: int = 1,
    ) -> None:
        self.samples, self.device, self.batch_sampler = samples, device, batch_sampler
        starts = range(0, len(sampler), batch_size)
        self.batches = [sampler[start : start + batch_size] for start in starts]

    def __len__(self) -> int:
        return len(self.batches if self.batch_sampler is None else self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        drawn = self.batches if self.batch_sampler is None else self.batch_sampler.draws()
        for indices in drawn:
            yield self.samples.batch(indices, self.device)
