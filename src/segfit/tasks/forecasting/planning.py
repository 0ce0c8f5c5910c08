"""What benchmark.py asks of forecasting: example batches."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from segfit.engine.task import Batch
from segfit.tasks.defaults import (
    costliest,
    device_augmentation,
    largest_first,
    without_augmentation,
)
from segfit.tasks.forecasting.assembly import sample_bytes
from segfit.tasks.forecasting.schema import held_out_shape

__all__ = [
    "costliest", "device_augmentation", "largest_first", "sample_bytes", "without_augmentation",
]  # fmt: skip


def train_example(config: DictConfig) -> Batch:
    """Return a training micro-batch without content."""
    return held_out_example(config, config.batch_size, ())[0]


def held_out_example(
    config: DictConfig,
    count: int,
    original: tuple[int, ...],  # noqa: ARG001
) -> tuple[Batch, list[int]]:
    """Return a validation batch without content; evaluation reads the index of each window."""
    rows, columns, targets, _ = held_out_shape(config)
    return {
        "window": torch.empty(count, rows, columns),
        "mean": torch.empty(count, columns),
        "std": torch.empty(count, columns),
        "scale": torch.empty(count, targets),
        "when": torch.empty(count, dtype=torch.int64),
        "index": torch.empty(count, dtype=torch.int64),
    }, [0]
