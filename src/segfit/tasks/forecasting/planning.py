"""What benchmark.py asks of forecasting: example batches."""

from typing import Any

import torch
from omegaconf import DictConfig

from segfit.config.tasks import Feeding
from segfit.engine.task import Batch
from segfit.tasks.forecasting.schema import held_out_shape

_GATHERED = "windows are gathered as a whole, not read by workers"


def feeding(config: DictConfig) -> Feeding:
    """Return that windows are gathered, and which options mean nothing to them."""
    idle = {
        "channels_last": "series are no pictures",
        "data.cache": "series are kept as they were read, once",
    }
    if config.data.place != "loader":
        idle |= {"loader.workers": _GATHERED, "loader.pin_memory": _GATHERED}
    if config.model.name == "lstm":
        idle["compile"] = "torch.compile leaves nn.LSTM as it is"
    faster = {"windows on the device": {"data.place": "device"}}
    return Feeding({"data.place": "loader"}, faster, larger=(1, 2), idle=idle)


def train_example(config: DictConfig) -> Batch:
    """Return a training micro-batch without content."""
    return held_out_example(config, config.batch_size)[0]


def held_out_example(config: DictConfig, count: int, *__: Any) -> tuple[Batch, list[int]]:
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
