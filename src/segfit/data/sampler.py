"""Which images make which batch: a pure function, so that a run can go on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

_MASK64 = (1 << 64) - 1


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed (0 … 2^63 - 1) of everything random about an image in an epoch.

    SplitMix64 (Steele et al., OOPSLA 2014) over the three numbers: neighbours share no pattern.
    """
    state = 0
    for number in (seed, epoch, index):
        state = _mix((state ^ (number & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64)
    return state >> 1


def _mix(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
    return state ^ (state >> 31)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed), a pure function of (length, batch_size, seed, epoch).

    Every image occurs at most once an epoch. An incomplete last batch is dropped, since batch norm
    hates small ones and a step of another shape is slow; only a data set smaller than a batch makes
    one of all it has. Batches of a single image thus occur only if there is but one image, or if
    `batch_size` is 1.

    Args:
        length: images of the data set.
        batch_size: images a batch; may be assigned, and holds from the next `__iter__` on.
        seed: the run's seed.
        shuffle: a new order every epoch; False keeps the order of the indices.
    """

    def __init__(self, length: int, batch_size: int, seed: int, *, shuffle: bool = True) -> None:
        if length < 1 or batch_size < 1:
            raise ValueError(f"length={length} and batch_size={batch_size} must be positive")
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self.start_image = 0

    def set_epoch(self, epoch: int, *, start_batch: int = 0, start_image: int = 0) -> None:
        """Choose the epoch that the next `__iter__` gives, and where in it.

        Args:
            epoch: 0-based.
            start_batch: batches of the present `batch_size` that are left out.
            start_image: images that are left out, in the epoch's order: how to go on after a change of
                `batch_size`; adds to `start_batch`.
        """
        self.epoch = epoch
        self.start_image = start_image + start_batch * self.batch_size

    def __len__(self) -> int:
        """Return the batches that the next `__iter__` gives."""
        left = self.length - self.start_image
        return left // self.batch_size or int(self.start_image == 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.arange(self.length)
        if self.shuffle:
            np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        # Copied: the loader draws batches ahead, while the next epoch may already be set.
        epoch, size, start = self.epoch, self.batch_size, self.start_image
        for batch in range(len(self)):
            first = start + batch * size
            indices = order[first : first + size].tolist()
            yield [(index, sample_seed(self.seed, epoch, index)) for index in indices]
