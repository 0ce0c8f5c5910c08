"""Epochs of training batches, as the loop asks for them."""

from collections.abc import Iterator
from itertools import islice

from segfit.data.collate import Batch
from segfit.data.prefetch import DevicePrefetcher
from segfit.data.sampler import EpochSampler
from segfit.data.source import Source


class TrainBatches:
    """Training batches by epoch and position.

    Args:
        sampler: decides which samples make which batch.
        batches: those batches on the device, as `sampler` was last set.
        source: the samples' names.
        limit: batches an epoch at the most, or None.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        batches: DevicePrefetcher,
        source: Source,
        limit: int | None = None,
    ) -> None:
        self.sampler = sampler
        self.batches = batches
        self.source = source
        per_epoch = sampler.length // sampler.step
        self._per_epoch = min(per_epoch, limit or per_epoch)

    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches an epoch."""
        return self._per_epoch

    def batches_left(self, sample: int) -> int:
        """Return the number of micro-batches that an epoch has from its `sample`th sample on."""
        step = self.sampler.step
        return (min(self.sampler.length, self._per_epoch * step) - sample) // step

    def epoch(self, epoch: int, start_sample: int) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from its `start_sample`th sample on."""
        left = self.batches_left(start_sample)
        if left <= 0:
            return iter(())
        self.sampler.set_epoch(epoch, start_sample=start_sample)
        return islice(iter(self.batches), left)

    def names(self, batch: Batch) -> list[str]:
        """Return the file of each sample of a batch; its id where there is none."""
        names = []
        for index in batch["index"].tolist():  # synchronises; only where something went wrong
            files = self.source.files(index)
            names.append(str(files[0]) if files else self.source.id(index))
        return names
