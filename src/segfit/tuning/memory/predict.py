"""What a config takes, from recordings of its own update and validation: each block is affine in the batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.assembly.task import planning_of
from segfit.engine.precision import Precision
from segfit.tuning.change import changed
from segfit.tuning.memory.curve import PARTS, RECORDED, Curve, Forecast, Moment
from segfit.tuning.memory.recorder import MemoryRecorder
from segfit.tuning.memory.recording import Recording, record

# Where the peak is looked for; between two of these batch sizes the peak does not move by much.
_BATCHES = np.unique(np.concatenate([np.arange(1, 129), np.geomspace(128, 1e6, 80).astype(int)]))
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
    fixed, each = _extra(small, large)
    moments = list(result.train.moments)
    augmentation = planning_of(config).device_augmentation(config)
    if augmentation is not None:
        now = peak_bytes(augmentation[0]) * augmentation[1]
        idle = _moment(small.living[small.train[0] - 1], np.zeros(len(PARTS)))
        moments.append(idle.plus(config.accumulate * fixed, config.accumulate * each + now))
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
    with MemoryRecorder("cpu") as recorder:
        work()
    changes = [math.copysign(recorder.sizes[abs(event)], event) for event in recorder.events]
    return int(np.cumsum(changes).max(initial=0))


def forecast(first: Recording, second: Recording) -> Forecast:
    """Return the memory of all batch sizes from recordings at two.

    Args:
        first: at some batch size.
        second: of the same config at a larger one.
    """
    same = _in_order(first) == _in_order(second)
    # Images are scored one by one, so the operations of a validation do depend on the batch.
    peaks = [_largest(recording.living[slice(*recording.val)]) for recording in (first, second)]
    return Forecast(
        Curve(_moments(first, second) if same else _stretches(first, second)),
        Curve([_moment(*_line(peaks, first.val_batch, second.val_batch))]),
        first.parameters,
        fixed_val=first.val_batch == second.val_batch,
    )


def _moments(first: Recording, second: Recording) -> list[Moment]:
    """Return the moments of two recordings of the same operations that are the peak at some batch size."""
    living = [recording.living[slice(*recording.train)] for recording in (first, second)]
    fixed, each = _line(living, first.batch, second.batch)
    totals = fixed.sum(1) + _BATCHES[:, None] * each.sum(1)
    return [_moment(fixed[peak], each[peak]) for peak in np.unique(totals.argmax(1))]


def _stretches(first: Recording, second: Recording) -> list[Moment]:
    """Return the peak of each stretch of an update, as the line through what two recordings say of it.

    A model may take another way for few pixels than for many, or go piece by piece: its moments then have no
    counterparts, but each forward pass does, and what lies between two.
    """
    peaks = []
    for recording in (first, second):
        begin, end = recording.train
        cuts = [mark - begin for mark in recording.passes]
        peaks.append(np.stack([*map(_largest, np.split(recording.living[begin:end], cuts))]))
    return list(map(_moment, *_line(peaks, first.batch, second.batch)))


def _extra(first: Recording, second: Recording) -> tuple[float, float]:
    """Return the bytes, fixed and by image, that one more micro-batch of a window keeps alive."""
    waiting = []
    for recording in (first, second):
        before, ready = recording.living.sum(1)[[recording.train[0] - 1, recording.passes[0] - 1]]
        waiting.append((ready - before) / recording.accumulate)
    fixed, each = _line(waiting, first.batch, second.batch)
    return float(fixed), float(each)


def _line(values: Sequence[Any], first: int, second: int) -> tuple[Any, Any]:
    """Return what is fixed and what each image adds, from the values at two batch sizes."""
    each = (values[1] - values[0]) / ((second - first) or 1)
    return values[0] - each * first, each


def _largest(living: NDArray[np.float64]) -> NDArray[np.float64]:
    return living[living.sum(1).argmax()]  # type: ignore[no-any-return]


def _moment(fixed: NDArray[np.float64], each: NDArray[np.float64]) -> Moment:
    named = [dict(zip(PARTS, values.tolist(), strict=True)) for values in (fixed, each)]
    return Moment(*({part: value for part, value in side.items() if value} for side in named))


def _in_order(recording: Recording) -> list[int]:
    """Return the events up to the end of the update; what dies together dies in order of age."""
    events: list[int] = []
    dead: list[int] = []
    for event in recording.memory.events[: recording.train[1]]:
        if event < 0:
            dead.append(event)
            continue
        events += [*sorted(dead), event]
        dead = []
    return events + sorted(dead)
