"""From a confusion matrix to the scores of a data set, as docs/metrics.md defines them."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes

SCORES = (
    *("miou", "macro_f1", "foreground_iou", "foreground_f1", "pixel_accuracy", "mean_accuracy"),
)


class Scores(NamedTuple):
    """The scores of a data set."""

    scores: dict[str, float]  # `SCORES`, 0-1; NaN where nothing in the ground truth decides them
    # iou, f1, accuracy → class name → 0-1, or None if no pixel has the class in truth
    per_class: dict[str, dict[str, float | None]]
    confusion: NDArray[np.int64]  # `(C, C)` pixels, rows ground truth, columns prediction
    pixels: int  # how many counted


def confusion_matrices(predictions: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Return one confusion matrix an image, `(B, C, C)` int64, rows ground truth.

    Predictions and masks are `(B, H, W)` integers, class indices; masks may hold `IGNORE_INDEX`.
    """
    masks = masks.long()
    cells = num_classes * num_classes
    index = torch.where(masks == IGNORE_INDEX, cells, masks * num_classes + predictions).flatten(1)
    # One more cell takes the ignored pixels: leaving them out would make the host wait for their
    # number. scatter_add_ rather than bincount for the same reason.
    counts = torch.zeros(len(masks), cells + 1, dtype=torch.int64, device=masks.device)
    counts.scatter_add_(1, index, torch.ones_like(index))
    return counts[:, :cells].reshape(len(masks), num_classes, num_classes)


def scores_of(confusion: NDArray[np.int64], classes: Classes) -> Scores:
    """Return the scores that follow from a confusion matrix, `(C, C)` int64 pixels, rows ground truth."""
    hits = np.diag(confusion)
    truth, predicted = confusion.sum(1), confusion.sum(0)
    pixels = int(truth.sum())
    present = truth > 0
    foreground = present & (np.arange(len(classes)) != classes.background)
    measures = {  # an absent class would divide 0 by 0; its value is never looked at
        "iou": hits / np.maximum(truth + predicted - hits, 1),
        "f1": 2 * hits / np.maximum(truth + predicted, 1),
        "accuracy": hits / np.maximum(truth, 1),
    }
    return Scores(
        scores={
            "miou": _mean(measures["iou"][present]),
            "macro_f1": _mean(measures["f1"][present]),
            "foreground_iou": _mean(measures["iou"][foreground]),
            "foreground_f1": _mean(measures["f1"][foreground]),
            "pixel_accuracy": float(hits.sum()) / pixels if pixels else float("nan"),
            "mean_accuracy": _mean(measures["accuracy"][present]),
        },
        per_class={
            measure: {
                name: float(values[index]) if present[index] else None
                for index, name in enumerate(classes.names)
            }
            for measure, values in measures.items()
        },
        confusion=confusion,
        pixels=pixels,
    )


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def image_scores(predictions: Tensor, masks: Tensor, num_classes: int) -> Tensor:
    """Return each image's own mean IoU, to find the worst; not a part of the data set's scores.

    Args as `confusion_matrices`.

    Returns:
        `(B,)` float64 on the device, the mean over classes in the image's ground truth; NaN for an
        image without a valid pixel.
    """
    confusion = confusion_matrices(predictions, masks, num_classes).double()
    hits = confusion.diagonal(dim1=1, dim2=2)
    truth, predicted = confusion.sum(2), confusion.sum(1)
    iou = hits / (truth + predicted - hits).clamp_min(1)
    return (iou * (truth > 0)).sum(1) / (truth > 0).sum(1)
