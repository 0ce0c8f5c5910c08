"""Epochs of training batches, and passes over held-out ones, as the loop asks for them."""

from collections.abc import Iterable, Iterator
from itertools import islice

from segfit.data.collate import Batch
from segfit.data.prefetch import DevicePrefetcher
from segfit.data.sampler import EpochSampler


class TrainBatches:
    """Training batches by epoch and position.

    Args:
        sampler: decides which images make which batch.
        batches: those batches on the device, as `sampler` was last set.
        limit: batches an epoch at the most, or None.
    """

    def __init__(
        self, sampler: EpochSampler, batches: DevicePrefetcher, limit: int | None = None
    ) -> None:
        self.sampler = sampler
        self.batches = batches
        sampler.set_epoch(0)
        self._per_epoch = min(len(sampler), limit or len(sampler))

    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches an epoch."""
        return self._per_epoch

    def epoch(self, epoch: int, start_batch: int) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from `start_batch` on."""
        if start_batch >= self._per_epoch:
            return iter(())
        self.sampler.set_epoch(epoch, start_batch=start_batch)
        return islice(iter(self.batches), self._per_epoch - start_batch)


class HeldOutBatches:
    """Held-out batches in order, again and again.

    Args:
        batches: on the device.
        length: how many there are.
        limit: batches a pass at the most, or None.
    """

    def __init__(self, batches: Iterable[Batch], length: int, limit: int | None = None) -> None:
        self.batches = batches
        self.length = min(length, limit or length)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.batches), self.length)
