"""Memory by part, for every batch size."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace

# In the order of their lives. "average" is the moving average of the weights.
PARTS = ("parameters", "average", "optimizer", "gradients", "activations", "workspace")

RECORDED = 2  # micro-batches of an update that are recorded at most; a third adds what `Forecast.waiting` says


@dataclass(frozen=True)
class Curve:
    """The peak over the batch size: the largest of some moments, at each of which what lives grows evenly with the batch."""

    # (moments, 2, PARTS): bytes by part that no sample adds to, and bytes by part of each sample.
    moments: list[list[list[float]]]

    def at(self, batch: int) -> dict[str, float]:
        """Return the bytes by part at the peak; parts that are absent are left out."""
        fixed, each = max(self.moments, key=lambda moment: sum(moment[0]) + batch * sum(moment[1]))
        sizes = {
            part: left + batch * more for part, left, more in zip(PARTS, fixed, each, strict=True)
        }
        return {part: size for part, size in sizes.items() if size > 0}

    def peak(self, batch: int) -> float:
        """Return the bytes at the peak."""
        return max(sum(fixed) + batch * sum(each) for fixed, each in self.moments)

    def largest(self, budget: float) -> float:
        """Return the largest batch that stays within the budget: 0 if none does, infinite if all do."""
        if self.peak(0) > budget:
            return 0
        growing = (moment for moment in self.moments if sum(moment[1]) > 0)
        return min(
            ((budget - sum(fixed)) // sum(each) for fixed, each in growing), default=math.inf
        )

    def plus(self, fixed: float, each: float) -> Curve:
        """Return the same moments with more activations."""
        moments, place = deepcopy(self.moments), PARTS.index("activations")
        for moment in moments:
            moment[0][place] += fixed
            moment[1][place] += each
        return Curve(moments)


@dataclass(frozen=True)
class Forecast:
    """What a composition takes, at any micro-batch."""

    train: Curve  # an update, over the size of its micro-batches
    val: Curve  # a validation, over the size of its batches
    parameters: int  # how many numbers the model has
    # Activations, fixed and of each sample, that each micro-batch beyond the recorded ones adds to every moment.
    waiting: list[float]
    recorded: int  # micro-batches of the update that `train` is about
    fixed_val: bool  # validation goes image by image, whatever the batch

    def peak(self, batch: int) -> float:
        """Return the bytes at the peak of training and validation."""
        return max(self.train.peak(batch), self.val.peak(batch))

    def largest(self, budget: float) -> float:
        """Return the largest micro-batch that stays within the budget: 0 if none does."""
        return min(self.train.largest(budget), self.val.largest(budget))

    def accumulating(self, micro_batches: int) -> Forecast:
        """Return the forecast of updates of so many micro-batches, at least as many as were recorded."""
        more = micro_batches - self.recorded
        train = self.train.plus(*(more * size for size in self.waiting))
        return replace(self, train=train, recorded=micro_batches)
