"""Memory by part, for every batch size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# In the order of their lives. "average" is the moving average of the weights.
PARTS = ("parameters", "average", "optimizer", "gradients", "activations", "workspace")

Bytes = dict[str, float]  # by part

RECORDED = 2  # micro-batches of an update that are recorded at most; a third adds what `Forecast.waiting` says


@dataclass(frozen=True)
class Moment:
    """A moment of a step: what lives then grows by the same number of bytes with every image of the batch."""

    fixed: Mapping[str, float]  # bytes by part that no image adds to
    each: Mapping[str, float]  # bytes by part of each image

    def at(self, batch: int) -> Bytes:
        """Return the bytes by part with `batch` images; parts that are absent are left out."""
        parts = {part: self.fixed.get(part, 0) + batch * self.each.get(part, 0) for part in PARTS}
        return {part: value for part, value in parts.items() if value > 0}

    def total(self, batch: int) -> float:
        """Return all bytes with `batch` images."""
        return sum(self.fixed.values()) + batch * sum(self.each.values())

    def plus(self, fixed: float = 0.0, each: float = 0.0) -> Moment:
        """Return the same moment with more activations."""
        return Moment(
            {**self.fixed, "activations": self.fixed.get("activations", 0) + fixed},
            {**self.each, "activations": self.each.get("activations", 0) + each},
        )

    def largest(self, budget: float) -> float:
        """Return the largest batch whose bytes stay within the budget; may be infinite."""
        left, each = budget - sum(self.fixed.values()), sum(self.each.values())
        if left < 0:
            return 0
        return math.inf if each <= 0 else left // each


@dataclass(frozen=True)
class Curve:
    """The peak over the batch size: the largest of some moments, one of which is the peak at any batch."""

    moments: Sequence[Moment]

    def at(self, batch: int) -> Bytes:
        """Return the bytes by part at the peak."""
        return max(self.moments, key=lambda moment: moment.total(batch)).at(batch)

    def peak(self, batch: int) -> float:
        """Return the bytes at the peak."""
        return max(moment.total(batch) for moment in self.moments)

    def largest(self, budget: float) -> float:
        """Return the largest batch that stays within the budget: 0 if none does, infinite if all do."""
        return min(moment.largest(budget) for moment in self.moments)


@dataclass(frozen=True)
class Forecast:
    """What a composition takes, at any micro-batch."""

    train: Curve  # an update, over the size of its micro-batches
    val: Curve  # a validation, over the size of its batches
    parameters: int  # how many numbers the model has
    # What each micro-batch of an update beyond the recorded ones adds to every moment.
    waiting: Moment = field(default_factory=lambda: Moment({}, {}))
    recorded: int = 1  # micro-batches of the update that `train` is about
    fixed_val: bool = False  # validation goes image by image, whatever the batch

    def val_batch(self, batch: int) -> int:
        """Return the images of a validation batch beside micro-batches of `batch`."""
        return 1 if self.fixed_val else batch

    def peak(self, batch: int) -> float:
        """Return the bytes at the peak of training and validation."""
        return max(self.train.peak(batch), self.val.peak(self.val_batch(batch)))

    def largest(self, budget: float) -> float:
        """Return the largest micro-batch that stays within the budget: 0 if none does."""
        train = self.train.largest(budget)
        if not self.fixed_val:
            return min(train, self.val.largest(budget))
        return train if self.val.peak(1) <= budget else 0

    def accumulating(self, micro_batches: int) -> Forecast:
        """Return the forecast of updates of so many micro-batches, at least as many as were recorded."""
        more = micro_batches - self.recorded
        if more == 0:
            return self
        fixed, each = (sum(side.values()) for side in (self.waiting.fixed, self.waiting.each))
        moments = [moment.plus(more * fixed, more * each) for moment in self.train.moments]
        return replace(self, train=Curve(moments), recorded=micro_batches)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Forecast:
        """Return the forecast whose fields, as plain values, are given; raise KeyError or TypeError for else."""
        curves = {
            name: Curve([Moment(**moment) for moment in values[name]["moments"]])
            for name in ("train", "val")
        }
        return cls(**{**values, **curves, "waiting": Moment(**values["waiting"])})
