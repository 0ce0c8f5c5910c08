"""Epochs of training batches, as the loop asks for them."""

from collections.abc import Iterator
from itertools import islice

from segfit.data.collate import Batch
from segfit.data.prefetch import DevicePrefetcher
from segfit.data.sampler import EpochSampler
from segfit.data.source import Source


class TrainBatches:
    """The `TrainingData` of the loop.

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
        self.sampler, self.batches, self.source = sampler, batches, source
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
        indices = batch["index"].tolist()  # synchronises; only where something went wrong
        source = self.source
        return [str(next(iter(source.files(index)), source.id(index))) for index in indices]
