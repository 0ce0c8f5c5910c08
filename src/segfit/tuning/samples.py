"""What a training sample costs the process that makes it: waiting for the disk, decoding, fitting, augmenting."""

import copy
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from segfit.data.source import Arrays, Source, SourceView
from segfit.tuning.verdict import Costs

SAMPLES = 32
_SECONDS = 3.0  # at most, however slow a sample is; one is measured in any case


class SlowSource(SourceView):
    """A source that waits some seconds before every read, as a slow disk would."""

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
        measured = []
        begun = time.perf_counter()
        for seed, index in enumerate(chosen):
            wall, cpu, _ = _timed(dataset.source.read, index)
            again, _, _ = _timed(dataset.source.read, index)  # as the next one finds the file
            without, _, sample = _timed(plain.__getitem__, (index, seed))
            augmented, _, _ = _timed(dataset.__getitem__, (index, seed))
            copied, _, _ = _timed(_copied, sample)
            augment = augmented - without if getattr(dataset, "augment", None) is not None else 0.0
            parts = (wall - cpu, min(cpu, wall), without - again, augment, copied)
            measured.append([max(part, 0.0) for part in parts])
            if time.perf_counter() - begun > _SECONDS:
                break
        *costs, copied = np.mean(measured, axis=0).tolist()
        return Costs(*costs), copied
    finally:
        torch.set_num_threads(threads)


def _copied(sample: Mapping[str, Any]) -> list[torch.Tensor]:
    return [torch.as_tensor(value).clone() for value in sample.values()]


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """Return (seconds by the clock, seconds of this thread on the processor, what `work` returned)."""
    wall, cpu = time.perf_counter(), time.thread_time()
    result = work(*arguments)
    return time.perf_counter() - wall, time.thread_time() - cpu, result
