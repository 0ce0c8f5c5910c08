"""Our own metric, and what those of torchmetrics get of an image; docs/metrics.md is the contract.

Its import takes seconds, torchmetrics': not before the first validation, unless `metrics.extra` has to be checked.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from segfit.tasks.scored import ExtraMetric, checked_metrics
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.scores import SCORES, Scores, confusion_matrices, scores_of

# Of torchmetrics, those that compare classes. No class in them opens a file that an untrusted config names.
PACKAGES = ("segmentation", "classification", "nominal", "clustering", "regression")
FILLED = {"ignore_index": IGNORE_INDEX, "task": "multiclass", "input_format": "index"}
FLAT = tuple(f"torchmetrics.{name}." for name in PACKAGES[2:])  # their metrics take vectors


class SegmentationMetrics(Metric):
    """A confusion matrix, `(C, C)` int64 with ground truth in rows, and the scores that follow from it.

    An update never waits for the device, unlike that of torchmetrics' `MulticlassConfusionMatrix`, which uses `bincount`.
    """

    full_state_update = False
    confusion: Tensor

    def __init__(self, classes: Classes) -> None:
        super().__init__(sync_on_compute=False)
        self.classes = classes
        counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
        self.add_state("confusion", counts, dist_reduce_fx="sum")

    def update(self, predictions: Tensor, masks: Tensor) -> None:
        """Count a batch, predictions and masks `(B, H, W)`; masks may hold `IGNORE_INDEX`."""
        self.confusion += confusion_matrices(predictions, masks, len(self.classes)).sum(0)

    def compute(self) -> Scores:
        """Return the scores of what this process counted; waits for the device."""
        return scores_of(self.confusion.cpu().numpy(), self.classes)


def extra_metrics(items: Sequence[Any], classes: Classes) -> list[ExtraMetric]:
    """Return the metrics of `metrics.extra`, each of which has scored an image of noise; raise a SegFitError with all problems."""
    generator = torch.Generator().manual_seed(0)
    prediction, mask = torch.randint(len(classes), (2, 16, 16), generator=generator)
    mask[:2] = IGNORE_INDEX
    return checked_metrics(
        items,
        packages=PACKAGES,
        filled={**FILLED, "num_classes": len(classes)},
        example=lambda extra: inputs_of(extra, prediction, mask, classes),
        labels=classes.names,
        taken=("loss", *SCORES),
    )


def inputs_of(
    extra: ExtraMetric, prediction: Tensor, mask: Tensor, classes: Classes
) -> tuple[Tensor, Tensor]:
    """Return what a metric of torchmetrics gets of prediction and mask `(H, W)`: `(1, H, W)` or `(N,)` int64.

    One that takes vectors gets the N pixels that count. Of the others, one with an `ignore_index` finds it at the ignored
    pixels of the mask, and one without the background, or class 0, in prediction and mask.
    """
    prediction, mask = prediction.long(), mask.long()
    ignored = mask == IGNORE_INDEX
    if extra.kind.__module__.startswith(FLAT):
        return prediction[~ignored], mask[~ignored]
    value = extra.arguments.get("ignore_index")
    if value is None:
        value = classes.background or 0
        prediction = prediction.masked_fill(ignored, value)
    mask = mask.masked_fill(ignored, value)
    if extra.kind.__name__ == "HausdorffDistance":  # torchmetrics 1.9 is right for squares alone
        (height, width), side = mask.shape, max(mask.shape)
        rim = (0, side - width, 0, side - height)
        prediction, mask = (F.pad(part, rim, value=value) for part in (prediction, mask))
    return prediction[None], mask[None]
