"""Which samples make which batch, a pure function, so that a run can be resumed; and batches on the device, as the loop takes them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Sampler, get_worker_info

from segfit.data.source import Source
from segfit.system.monitor import phase

Batch: TypeAlias = dict[str, torch.Tensor]
Collate: TypeAlias = Callable[[Sequence[Any]], Any]
Indices: TypeAlias = Sequence[int] | NDArray[np.int64]

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


@dataclass(eq=False)
class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (index, seed), a pure function of (length, batch size, seed, epoch, first sample).

    Every sample occurs at most once an epoch, unless there are `weights`. An incomplete last batch is dropped, since batch
    norm hates small ones and a step of another shape is slow; a data set smaller than a batch makes batches of all it has. So
    batches of a single sample occur only if there is no other sample, or if `batch_size` is 1.

    Several processes cut every batch of batch_size × world_size samples into equal shares, so that together they
    see what one process would with batches of that size.
    """

    samples: int  # of the data set, `world_size` at least
    batch_size: int  # samples a batch of one process
    seed: int  # of the run
    rank: int = 0  # 0-based number of this process
    world_size: int = 1  # processes that share each batch
    repeats: int = 1  # times that an index comes in a row, each with a seed of its own; `length` counts them all
    # (samples,) an index comes as often as its share of them says, rounded up or down
    weights: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        self.length = self.samples * self.repeats
        self.size = min(self.batch_size, self.length // self.world_size)
        self.step = self.size * self.world_size
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

        With `weights`, `samples` is added to an index each time that it comes again.
        """
        order, random = np.arange(self.samples), np.random.default_rng((self.seed, self.epoch))
        if self.weights is not None:
            random.shuffle(order)  # else neighbours would be drawn in turns
            ends = np.cumsum(self.weights[order])
            ends = np.floor(self.samples * (ends / ends[-1]) + random.random()).astype(int)
            times = np.diff(ends, prepend=0)
            before = np.repeat(np.cumsum(times) - times, times)
            order = np.repeat(order, times) + self.samples * (np.arange(len(before)) - before)
        random.shuffle(order)
        order = (order[:, None] * self.repeats + np.arange(self.repeats)).ravel()
        first = self.start_sample + self.rank * self.size
        for batch in range(len(self)):
            start = first + batch * self.step
            yield order[start : start + self.size]


def stack(tensors: Sequence[torch.Tensor], fill: float = 0) -> torch.Tensor:
    """Return tensors (…, h, w) of one dtype as one (B, …, H, W), padded with `fill` at the bottom and right to the largest.

    Tensors of one shape may have any number of dimensions. In a worker, they are written straight into the memory that they
    are handed over in; raises a RuntimeError there if shared memory has no room.
    """
    sizes = [tuple(tensor.shape) for tensor in tensors]
    largest = tuple(map(max, *sizes)) if len(sizes) > 1 else sizes[0]
    shape, stacked = (len(tensors), *largest), tensors[0].new_empty(0)
    if get_worker_info() is not None:
        # torch would copy it there in a thread that hands batches over. Where /dev/shm is full, that thread loses the
        # batch without a message and every process waits without end; here it is an error, and one copy less.
        size = stacked.element_size() * torch.Size(shape).numel()
        stacked.set_(torch.UntypedStorage._new_shared(size))  # as torch's own does
    stacked.resize_(shape)
    if len(set(sizes)) == 1:
        return torch.stack(list(tensors), out=stacked)
    stacked.fill_(fill)
    for target, tensor in zip(stacked, tensors, strict=True):
        target[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
    return stacked


@dataclass
class GatheringLoader:
    """Takes the place of a `Loader` for datasets that make batches where their data lie, with nothing to read or collate.

    They say so by `gathers`. Their `batch(indices, device)`, which depends on the indices alone, returns a `Batch` on the
    device, or on the host in memory that can be copied from there.
    """

    samples: Any
    device: torch.device
    batches: EpochSampler | Sequence[Sequence[int]]  # indices of each
    num_workers: ClassVar = 0
    left_out: ClassVar = ()
    remarks: ClassVar[dict[int, str]] = {}

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        drawn = self.batches.draws() if isinstance(self.batches, EpochSampler) else self.batches
        for indices in drawn:
            yield self.samples.batch(indices, self.device)


@dataclass(eq=False)
class DevicePrefetcher:
    """Yields a loader's batches on `device`, one ahead of what the device works on.

    The host queues a step's kernels and asks for the next batch long before they have run; that batch is copied
    meanwhile, on a stream of its own and from pinned memory.
    """

    loader: Any  # a `Loader` or a `GatheringLoader`, which gives batches of host tensors
    device: torch.device  # where they go; on the CPU they pass through
    # False makes the host wait for each copy, in the stream that the device works on, for comparison
    non_blocking: bool = True
    # what makes of a batch of the loader the one that is copied, in the stream of the copy
    finish: Callable[[Batch], Batch] | None = None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        overlap = self.device.type == "cuda" and self.non_blocking
        stream = torch.cuda.Stream(self.device) if overlap else None
        for batch in self.loader:
            with torch.cuda.stream(stream) if stream else nullcontext(), phase("copy"):
                made = batch if self.finish is None else self.finish(batch)
                moved = {k: one.to(self.device, non_blocking=overlap) for k, one in made.items()}
            if stream is not None:
                current = torch.cuda.current_stream(self.device)
                # The device, not the host, waits: work that is queued from here on comes after the copy.
                current.wait_stream(stream)
                for tensor in moved.values():
                    # The allocator must not hand this memory to the next copy before `current` is done with it.
                    tensor.record_stream(current)
            yield moved


@dataclass(eq=False)
class TrainBatches:
    """The `TrainingData` of the loop."""

    sampler: EpochSampler  # decides which samples make which batch
    batches: DevicePrefetcher  # those batches on the device, as `sampler` was last set
    source: Source  # the samples' names
    limit: int | None = None  # batches an epoch at the most

    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches an epoch."""
        per_epoch = self.sampler.length // self.sampler.step
        return min(per_epoch, self.limit or per_epoch)

    def batches_left(self, sample: int) -> int:
        """Return the number of micro-batches that an epoch has from its `sample`th sample on."""
        step = self.sampler.step
        return (min(self.sampler.length, self.batches_per_epoch() * step) - sample) // step

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
