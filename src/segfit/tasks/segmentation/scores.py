"""From a confusion matrix to the scores of a data set, as docs/metrics.md defines them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.engine.findings import Cell, Column, Table
from segfit.report.text import number
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes

SCORES = ("miou", "macro_f1", "foreground_iou", "foreground_f1", "pixel_accuracy", "mean_accuracy")
_COLUMNS = (
    Column("class"),
    *(Column(name, ".4f") for name in ("IoU", "F1", "accuracy")),
    Column("pixels", ","),
    Column("share", ".1%"),
)


class Scores(NamedTuple):
    """The scores of a data set."""

    scores: dict[str, float]  # `SCORES`, 0-1; NaN where nothing in the ground truth decides them
    # iou, f1, accuracy → class name → 0-1, or None if no pixel has the class in truth
    per_class: dict[str, dict[str, float | None]]
    confusion: NDArray[np.int64]  # `(C, C)` pixels, rows ground truth, columns prediction


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
    sums = sums_of(confusion)
    per_class = {
        measure: {
            name: float(value) if pixels else None
            for name, value, pixels in zip(classes.names, values, sums[1], strict=True)
        }
        for measure, values in _measures(sums).items()
    }
    found = {name: float(value) for name, value in scores_of_sums(sums, classes).items()}
    return Scores(found, per_class, confusion)


def sums_of(confusion: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the pixels (…, 3, C) of each class that decide the scores: right, in truth, predicted."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.stack([hits, confusion.sum(-1), confusion.sum(-2)], -2)


def scores_of_sums(sums: NDArray[Any], classes: Classes) -> dict[str, NDArray[np.float64]]:
    """Return `SCORES` (…) of the pixels (…, 3, C) of `sums_of`."""
    hits, truth, _ = np.moveaxis(sums, -2, 0)
    present, of = truth > 0, _measures(sums)
    foreground = present & (np.arange(len(classes)) != classes.background)
    return {
        "miou": share(of["iou"] * present, present),
        "macro_f1": share(of["f1"] * present, present),
        "foreground_iou": share(of["iou"] * foreground, foreground),
        "foreground_f1": share(of["f1"] * foreground, foreground),
        "pixel_accuracy": share(hits, truth),
        "mean_accuracy": share(of["accuracy"] * present, present),
    }


def share(parts: NDArray[Any], whole: NDArray[Any]) -> NDArray[np.float64]:
    """Return the sum of parts (…, C) over that of the whole, NaN where that is nothing."""
    parts, whole = parts.sum(-1), whole.sum(-1)
    return np.where(whole > 0, parts / np.maximum(whole, 1), np.nan)


def _measures(sums: NDArray[Any]) -> dict[str, NDArray[np.float64]]:
    """Return each class's measures (…, C); that of an absent class is never looked at."""
    hits, truth, predicted = np.moveaxis(sums, -2, 0)
    return {
        "iou": hits / np.maximum(truth + predicted - hits, 1),
        "f1": 2 * hits / np.maximum(truth + predicted, 1),
        "accuracy": hits / np.maximum(truth, 1),
    }


def score_table(scores: Scores, classes: Classes) -> Table:
    """Return IoU, F1 and accuracy of every class, its ground-truth pixels, and the means over the classes.

    A class that is not in the ground truth has no score (None) and counts in no mean. With a background, the means over
    the foreground are shown too.
    """
    truth = scores.confusion.sum(1).tolist()
    measures = scores.per_class.values()

    def means(title: str, without: int | None = None) -> list[Cell]:
        names = [name for index, name in enumerate(classes.names) if index != without]
        present = [[one for name in names if (one := of[name]) is not None] for of in measures]
        return [title, *(float(np.mean(some)) if some else None for some in present), "", ""]

    totals = [means("macro mean")]
    if classes.background is not None:
        totals.append(means("foreground mean", classes.background))
    return Table(
        "per_class",
        "",
        _COLUMNS,
        [
            [name, *(of[name] for of in measures), pixels, pixels / max(sum(truth), 1)]
            for name, pixels in zip(classes.names, truth, strict=True)
        ],
        totals=totals,
        colors=classes.colors,
        caption=f"pixel accuracy {number(scores.scores['pixel_accuracy'])}",
    )
