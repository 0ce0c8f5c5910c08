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
from segfit.tasks.forecasting.data.files import columns_of

__all__ = ["costliest", "device_augmentation", "largest_first", "without_augmentation"]


def sample_bytes(config: DictConfig) -> int:
    """Return the bytes of a window, float32."""
    rows = config.data.lookback + config.data.horizon
    return int(4 * rows * len(columns_of(config).columns))


def train_example(config: DictConfig) -> Batch:
    """Return a training micro-batch without content."""
    return held_out_example(config, config.batch_size, ())[0]


def held_out_example(
    config: DictConfig,
    count: int,
    original: tuple[int, ...],  # noqa: ARG001
) -> tuple[Batch, list[int]]:
    """Return a validation batch without content; evaluation reads the index of each window."""
    layout = columns_of(config)
    columns = len(layout.columns)
    return {
        "window": torch.empty(count, config.data.lookback + config.data.horizon, columns),
        "mean": torch.empty(count, columns),
        "std": torch.empty(count, columns),
        "scale": torch.empty(count, layout.targets),
        "when": torch.empty(count, dtype=torch.int64),
        "index": torch.empty(count, dtype=torch.int64),
    }, [0]
