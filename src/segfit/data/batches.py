"""Epochs of training batches, and passes over held-out ones, as the loop asks for them."""

from collections.abc import Iterable, Iterator
from itertools import islice

from segfit.data.prefetch import DevicePrefetcher
from segfit.data.sampler import EpochSampler
from segfit.data.source import Source
from segfit.tasks.segmentation.data.collate import Batch


class TrainBatches:
    """Training batches by epoch and position.

    Args:
        sampler: decides which images make which batch.
        batches: those batches on the device, as `sampler` was last set.
        source: the images' names.
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

    def batches_left(self, image: int) -> int:
        """Return the number of micro-batches that an epoch has from its `image`th image on."""
        return min(self.sampler.length - image, self._per_epoch * self.sampler.step - image) // (
            self.sampler.step
        )

    def epoch(self, epoch: int, start_sample: int) -> Iterator[Batch]:
        """Yield the batches of an epoch on the device, from its `start_sample`th image on."""
        left = self.batches_left(start_sample)
        if left <= 0:
            return iter(())
        self.sampler.set_epoch(epoch, start_sample=start_sample)
        return islice(iter(self.batches), left)

    def names(self, batch: Batch) -> list[str]:
        """Return the file of each image of a batch; its id where there is none."""
        indices = batch["index"].tolist()  # synchronises; only where something went wrong
        files = [self.source.files(index) for index in indices]
        return [
            str(paths[0]) if paths else self.source.id(index)
            for index, paths in zip(indices, files, strict=True)
        ]


class HeldOutBatches:
    """Held-out batches in order, again and again.

    Args:
        batches: on the device.
        length: how many there are.
    """

    def __init__(self, batches: Iterable[Batch], length: int) -> None:
        self.batches = batches
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return islice(iter(self.batches), self.length)
