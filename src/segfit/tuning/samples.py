"""What a training sample costs the process that makes it: waiting for the disk, decoding, fitting, augmenting."""

import copy
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean
from typing import Any

import torch

from segfit.data.source import Arrays, Source, SourceView
from segfit.tuning.verdict import Costs

SAMPLES = 32
_SECONDS = 3.0  # at most, however slow a sample is; one is measured in any case


class SlowSource(SourceView):
    """A source that waits before every read, as a slow disk would.

    Args:
        source: that reads.
        seconds: to wait.
    """

    def __init__(self, source: Source, seconds: float) -> None:
        super().__init__(source)
        self.seconds = seconds

    def read(self, index: int) -> Arrays:
        """Wait and read."""
        time.sleep(self.seconds)
        return self.source.read(index)


def measure_costs(dataset: Any) -> tuple[Costs, float]:
    """Return the mean costs of samples that are drawn at random, and the seconds that a plain copy of one takes.

    One thread works, as in a data worker. Waiting is what passes by the clock but not by the processor's.
    """
    chosen = random.Random(0).sample(range(len(dataset)), min(SAMPLES, len(dataset)))
    plain = copy.copy(dataset)
    plain.augment = None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset[chosen[0], 0]  # imports and tables come with the first one
        costs: list[Costs] = []
        copies: list[float] = []
        begun = time.perf_counter()
        for seed, index in enumerate(chosen):
            wall, cpu, _ = _timed(partial(dataset.source.read, index))
            again, _, _ = _timed(
                partial(dataset.source.read, index)
            )  # as the next one finds the file
            without, _, sample = _timed(partial(plain.__getitem__, (index, seed)))
            augmented, _, _ = _timed(partial(dataset.__getitem__, (index, seed)))
            copied, _, _ = _timed(partial(_copied, sample))
            copies.append(copied)
            costs.append(
                Costs(
                    wait=max(wall - cpu, 0.0),
                    decode=min(cpu, wall),
                    fit=max(without - again, 0.0),
                    augment=max(augmented - without, 0.0)
                    if getattr(dataset, "augment", None) is not None
                    else 0.0,
                )
            )
            if time.perf_counter() - begun > _SECONDS:
                break
        means = Costs(
            *(fmean(getattr(cost, name) for cost in costs) for name in Costs.__dataclass_fields__)
        )
        return means, fmean(copies)
    finally:
        torch.set_num_threads(threads)


def _copied(sample: Mapping[str, Any]) -> list[torch.Tensor]:
    return [torch.as_tensor(value).clone() for value in sample.values()]


def _timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return (seconds by the clock, seconds of this thread on the processor, what `work` returned)."""
    wall, cpu = time.perf_counter(), time.thread_time()
    result = work()
    return time.perf_counter() - wall, time.thread_time() - cpu, result
