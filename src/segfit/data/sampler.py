"""Which samples make which batch: a pure function, so that a run can be resumed where it stopped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

_UINT64 = (1 << 64) - 1


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Return the seed (0 … 2^63 - 1) of everything random about a sample in an epoch.

    SplitMix64 (Steele et al., OOPSLA 2014) over the three numbers: neighbours share no pattern.
    """
    state = 0
    for number in (seed, epoch, index):
        state = (state ^ (number & _UINT64)) + 0x9E3779B97F4A7C15 & _UINT64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _UINT64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _UINT64
        state ^= state >> 31
    return state >> 1


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed), a pure function of (length, batch size, seed, epoch, first sample).

    Every sample occurs at most once an epoch, unless there are `weights`. An incomplete last batch is dropped, since batch norm
    hates small ones and a step of another shape is slow; a data set smaller than a batch makes
    batches of all it has. So batches of a single sample occur only if there is no other sample, or if
    `batch_size` is 1.

    Several processes cut every batch of batch_size × world_size samples into equal shares, so that together they
    see what one process would with batches of that size.

    Args:
        length: samples of the data set, `world_size` at least.
        batch_size: samples a batch of one process.
        seed: the run's seed.
        shuffle: a new order every epoch; False keeps the order of the indices.
        rank: 0-based number of this process.
        world_size: processes that share each batch.
        repeats: times that an index comes in a row, each with a seed of its own; `length` counts them all.
        weights: (length,) an index comes as often as its share of them says, rounded up or down.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        *,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        repeats: int = 1,
        weights: NDArray[np.float64] | None = None,
    ) -> None:
        self.samples, self.weights = length, weights
        self.length, self.repeats = length * repeats, repeats
        self.seed, self.shuffle, self.rank = seed, shuffle, rank
        self.size = min(batch_size, self.length // world_size)
        self.step = self.size * world_size
        self.epoch = self.start_sample = 0

    def set_epoch(self, epoch: int, *, start_sample: int = 0) -> None:
        """Choose the 0-based epoch that the next `__iter__` gives, and how many samples of it are left out.

        Samples of all processes, in the epoch's order, rather than batches: a run can be resumed with batches of another
        size.
        """
        self.epoch, self.start_sample = epoch, start_sample

    def __len__(self) -> int:
        """Return the batches that the next `__iter__` gives."""
        return max(self.length - self.start_sample, 0) // self.step

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Copied: the loader draws batches ahead, while the next epoch may already be set.
        seed, epoch, repeats, many = self.seed, self.epoch, self.repeats, self.samples
        for found in self.draws():
            draws = found.tolist()
            yield [(draw // repeats % many, sample_seed(seed, epoch, draw)) for draw in draws]

    def draws(self) -> Iterator[NDArray[np.int64]]:
        """Yield what each batch draws, (size,): indices, or with `repeats` indices × repeats + the number of the time.

        With `weights`, `length` is added to an index each time that it comes again.
        """
        order, random = np.arange(self.samples), np.random.default_rng((self.seed, self.epoch))
        if self.weights is not None:
            random.shuffle(order)  # else neighbours would be drawn in turns
            ends = np.cumsum(self.weights[order])
            ends = np.floor(self.samples * (ends / ends[-1]) + random.random()).astype(int)
            times = np.diff(ends, prepend=0)
            before = np.repeat(np.cumsum(times) - times, times)
            order = np.repeat(order, times) + self.samples * (np.arange(len(before)) - before)
        if self.shuffle:
            random.shuffle(order)
        order = (order[:, None] * self.repeats + np.arange(self.repeats)).ravel()
        first = self.start_sample + self.rank * self.size
        for batch in range(len(self)):
            start = first + batch * self.step
            yield order[start : start + self.size]
