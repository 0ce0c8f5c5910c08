"""What benchmark.py asks of restoration: the costliest config and example batches."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.config.check import plain
from segfit.engine.task import Batch
from segfit.report.panels import Picture, draw_rows
from segfit.tasks.restoration.degradations import Degradation
from segfit.tasks.restoration.schema import channels_of
from segfit.tasks.restoration.task import RestorationTask, shown

_PROBE = 64  # pixels a side: degrading takes the same bytes a pixel of any picture


def costliest(config: DictConfig) -> DictConfig:
    """Return a copy with random features in the loss: they take the same memory, and no files."""
    config = config.copy()
    config.loss.weights = None
    return config


def train_example(config: DictConfig) -> Batch:
    """Return a training micro-batch without content."""
    shape = (config.batch_size, channels_of(config), config.patch_size, config.patch_size)
    batch = {name: torch.empty(config.batch_size, dtype=torch.int64) for name in ("seed", "index")}
    names = ("target", "input") if config.data.name == "pairs" else ("target",)
    return batch | {name: torch.empty(shape, dtype=torch.uint8) for name in names}


def held_out_example(
    config: DictConfig, count: int, original: tuple[int, ...]
) -> tuple[Batch, list[int]]:
    """Return so many pictures of a size without content, and the number that evaluation reads for each: its index."""
    shape = (count, channels_of(config), *original)
    made = torch.uint8 if config.data.name == "pairs" else torch.float32
    batch = {
        "input": torch.empty(shape, dtype=made),
        "target": torch.empty(shape, dtype=torch.uint8),
        "index": torch.empty(count, dtype=torch.int64),
    }
    return batch, [0]


def draw_batch(task: RestorationTask, batch: Batch, seed: int, names: Sequence[str]) -> Picture:
    """Return a picture (H, W, 3) of a training batch's first patches, inputs beside targets."""
    patches = zip(names, *task.prepare(batch, seed), strict=False)
    return draw_rows(
        [(name, {"input": shown(one), "target": shown(other)}) for name, one, other in patches]
    )


def without_augmentation(task: RestorationTask) -> RestorationTask:
    """Return a task that degrades nothing: its inputs are copies of the targets."""
    return replace(task, degrade=lambda targets, _: targets.clone())


def device_augmentation(config: DictConfig) -> tuple[Callable[[], Any], float] | None:
    """Return a function that degrades a few patches, and how many of them are as large as a sample; None for pairs."""
    if config.data.name == "pairs":
        return None
    degrade = Degradation(plain(config.degrade))
    patches, seeds = torch.rand(2, channels_of(config), _PROBE, _PROBE), torch.arange(2)
    return (lambda: degrade(patches, seeds)), config.patch_size**2 / (2 * _PROBE**2)
