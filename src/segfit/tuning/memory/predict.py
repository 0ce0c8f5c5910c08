"""What a config takes, from recordings of its own update and validation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from segfit.assembly.task import planning_of
from segfit.engine.precision import Precision
from segfit.tuning.change import changed
from segfit.tuning.memory.affine import extra, forecast, idle
from segfit.tuning.memory.curve import RECORDED, Curve, Forecast, Moment
from segfit.tuning.memory.recorder import MemoryRecorder
from segfit.tuning.memory.recording import record
from segfit.tuning.memory.scratch import no_scratch

BATCHES = (12, 16)  # large enough that models take the way that they take for many pixels
VAL_BATCHES = (4, 6)  # images are scored one by one: more would only take longer


def predict(
    config: DictConfig, device_type: str, precision: str, original: tuple[int, ...]
) -> Forecast:
    """Return the memory of training and validation at any micro-batch; nothing is downloaded, no device is needed.

    Args:
        config: checked; its batch_size does not matter, nor by how much accumulate is above 2: see
            `Forecast.accumulating`.
        device_type: "cuda" or "cpu", by whose rules types and kernels are chosen.
        precision: "fp32", "bf16" or "fp16".
        original: (height, width) of the largest held-out image.

    Raises:
        SegFitError: if the model cannot be made.
    """
    config = changed(config, {"accumulate": min(config.accumulate, RECORDED)})
    mode = Precision(precision, device_type)
    small, large = (
        record(changed(config, {"batch_size": batch}), mode, original, val_batch)
        for batch, val_batch in zip(BATCHES, VAL_BATCHES, strict=True)
    )
    result = forecast(small, large)
    fixed, each = extra(small, large)
    moments = list(result.train.moments)
    augmentation = planning_of(config).device_augmentation(config)
    if augmentation is not None:
        now = peak_bytes(augmentation[0]) * augmentation[1]
        moments.append(idle(small).plus(config.accumulate * fixed, config.accumulate * each + now))
    # On a card the next window's samples are copied ahead.
    ahead = planning_of(config).sample_bytes(config) if device_type == "cuda" else 0
    return dataclasses.replace(
        result,
        train=Curve([moment.plus(each=config.accumulate * ahead) for moment in moments]),
        waiting=Moment({"activations": fixed}, {"activations": each + ahead}),
        recorded=config.accumulate,
    )


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the bytes that a function takes at its peak, results included; it runs on the CPU, with data."""
    with MemoryRecorder("cpu", block=1, scratch=no_scratch) as recorder:
        work()
    living = peak = 0
    for event in recorder.events:
        living += recorder.sizes[abs(event)] * (1 if event > 0 else -1)
        peak = max(peak, living)
    return peak
