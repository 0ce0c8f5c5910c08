"""From recordings at two batch sizes to every batch size: each block's size is affine in the batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from segfit.tuning.memory.curve import PARTS, Bytes, Curve, Forecast, Moment
from segfit.tuning.memory.recording import Recording

Bytes2D = NDArray[np.float64]  # (moments, parts)

# Where the peak is looked for; between two of these batch sizes the peak does not move by much.
_BATCHES = np.unique(np.concatenate([np.arange(1, 129), np.geomspace(128, 1e6, 80).astype(int)]))


def forecast(first: Recording, second: Recording) -> Forecast:
    """Return the memory of all batch sizes from recordings at two.

    Args:
        first: at some batch size.
        second: of the same config at a larger one.
    """
    same = _in_order(first) == _in_order(second)
    moments = _moments(first, second) if same else _stretches(first, second)
    return Forecast(
        Curve(moments),
        Curve([_validation(first, second)]),
        first.parameters,
        fixed_val=first.val_batch == second.val_batch,
    )


def _moments(first: Recording, second: Recording) -> list[Moment]:
    """Return the moments of two recordings of the same operations that are the peak at some batch size."""
    end = first.train[1]
    at_first, at_second = _bytes(first)[:end], _bytes(second)[:end]
    each = (at_second - at_first) / (second.batch - first.batch)
    fixed = at_first - each * first.batch
    train = slice(*first.train)
    totals = fixed[train].sum(1) + _BATCHES[:, None] * each[train].sum(1)
    peaks = np.unique(totals.argmax(1))
    return [_moment(fixed[train][peak], each[train][peak]) for peak in peaks]


def _stretches(first: Recording, second: Recording) -> list[Moment]:
    """Return the peak of each stretch of an update, as the line through what two recordings say of it.

    A model may take another way for few pixels than for many, or go piece by piece: its moments then have no
    counterparts, but each forward pass does, and what lies between two.
    """
    peaks = []
    for recording in (first, second):
        begin, end = recording.train
        cuts = [mark - begin for mark in recording.passes]
        stretches = np.split(_bytes(recording)[begin:end], cuts)
        peaks.append(np.stack([stretch[stretch.sum(1).argmax()] for stretch in stretches]))
    each = (peaks[1] - peaks[0]) / (second.batch - first.batch)
    return [_moment(*both) for both in zip(peaks[0] - each * first.batch, each, strict=True)]


def extra(first: Recording, second: Recording) -> tuple[float, float]:
    """Return the bytes, fixed and by image, that one more micro-batch of a window keeps alive."""
    waiting = []
    for recording in (first, second):
        total = _bytes(recording).sum(1)
        before, ready = total[recording.train[0] - 1], total[recording.passes[0] - 1]
        waiting.append((ready - before) / recording.accumulate)
    each = (waiting[1] - waiting[0]) / (second.batch - first.batch)
    return float(waiting[0] - each * first.batch), float(each)


def idle(recording: Recording) -> Moment:
    """Return the moment before an update, which no image adds to."""
    return _moment(_bytes(recording)[recording.train[0] - 1], np.zeros(len(PARTS)))


def _validation(first: Recording, second: Recording) -> Moment:
    """Return the line through both peaks: images are scored one by one, so operations do depend on the batch."""
    peaks = []
    for recording in (first, second):
        during = _bytes(recording)[slice(*recording.val)]
        peaks.append(during[during.sum(1).argmax()])
    each = (peaks[1] - peaks[0]) / ((second.val_batch - first.val_batch) or 1)
    return _moment(peaks[0] - each * first.val_batch, each)


def _moment(fixed: NDArray[np.float64], each: NDArray[np.float64]) -> Moment:
    def by_part(values: NDArray[np.float64]) -> Bytes:
        return {part: float(value) for part, value in zip(PARTS, values, strict=True) if value}

    return Moment(by_part(fixed), by_part(each))


def _in_order(recording: Recording) -> list[int]:
    """Return the events up to the end of the update; what dies together dies in order of age."""
    events: list[int] = []
    dead: list[int] = []
    for event in recording.events[: recording.train[1]]:
        if event < 0:
            dead.append(event)
            continue
        events += [*sorted(dead), event]
        dead = []
    return events + sorted(dead)


def _bytes(recording: Recording) -> Bytes2D:
    """Return the living bytes after each event, by part."""
    names = {part: index for index, part in enumerate(PARTS)}
    changes = np.zeros((len(recording.events), len(PARTS)))
    for row, event in enumerate(recording.events):
        number = abs(event)
        part = names[recording.parts.get(number, "activations")]
        changes[row, part] = recording.sizes[number] * (1 if event > 0 else -1)
    return changes.cumsum(0)
