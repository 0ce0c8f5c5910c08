"""The scores of a data set, as docs/metrics.md defines them: from a confusion matrix; of boundaries; of probabilities."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from segfit.engine.findings import Cell, Table, columns
from segfit.errors import SegFitError
from segfit.report.text import number
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes

Pixels = NDArray[np.uint8]
Sums = NDArray[np.float64]

SCORES = ("miou", "macro_f1", "foreground_iou", "foreground_f1", "pixel_accuracy", "mean_accuracy")
BINS = 15  # of probabilities, of equal width, as in Guo et al., arXiv 1706.04599
_COLUMNS = columns("class | IoU:.4f | F1:.4f | accuracy:.4f | pixels:, | share:.1%")


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
    truth, measures = scores.confusion.sum(1).tolist(), scores.per_class.values()
    rows: list[list[Cell]] = [
        [name, *(of[name] for of in measures), pixels, pixels / max(sum(truth), 1)]
        for name, pixels in zip(classes.names, truth, strict=True)
    ]

    def means(title: str, without: int | None = None) -> list[Cell]:
        some = [row[1:4] for index, row in enumerate(rows) if truth[index] and index != without]
        return [title, *(np.array(some, float).mean(0).tolist() if some else [None] * 3), "", ""]

    totals = [means("macro mean")]
    if classes.background is not None:
        totals.append(means("foreground mean", classes.background))
    caption = f"pixel accuracy {number(scores.scores['pixel_accuracy'])}"
    return Table(
        "per_class", "", _COLUMNS, rows, totals=totals, colors=classes.colors, caption=caption
    )


def boundary_counts(prediction: Pixels, truth: Pixels, classes: Classes, tolerance: float) -> Sums:
    """Return (6, C) of a prediction and its ground truth (H, W), class indices; the truth may hold `IGNORE_INDEX`.

    Of each class: predicted boundary pixels within `tolerance` pixels of a true one, all of them; true ones within it of a
    predicted one, all of them; objects that are missed, all of them.
    """
    from scipy import ndimage

    counts, valid = np.zeros((6, len(classes))), truth != IGNORE_INDEX
    for index in {*np.unique(truth[valid]), *np.unique(prediction[valid])} - {classes.background}:
        inside = [(pixels == index) & valid for pixels in (prediction, truth)]
        # Against what counts alone: an edge of the image or of an ignored area is no boundary.
        rims = [one & ndimage.binary_dilation(valid & ~one) for one in inside]
        for row, rim, other in ((0, *rims), (2, *rims[::-1])):
            near = ndimage.distance_transform_edt(~other)[rim] <= tolerance if other.any() else 0
            counts[row : row + 2, index] = np.sum(near), rim.sum()
        objects, count = ndimage.label(inside[1], np.ones((3, 3)))
        hit = np.count_nonzero(np.unique(objects[inside[0]]))
        counts[4:, index] = count - hit, count
    return counts


def boundary_scores(sums: Sums, present: NDArray[np.bool_]) -> dict[str, Sums]:
    """Return scores (…) of sums (…, 6, C) over images, means over the classes `present` (…, C) that have a boundary."""
    near, predicted, near_truth, truth, missed, objects = np.moveaxis(sums, -2, 0)
    where = present & (predicted + truth > 0)
    precision, recall = near / np.maximum(predicted, 1), near_truth / np.maximum(truth, 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    nsd = (near + near_truth) / np.maximum(predicted + truth, 1)
    return {
        "boundary_f1": share(f1 * where, where),
        "surface_dice": share(nsd * where, where),
        "missed_objects": share(missed, objects),
    }


def calibration_gaps(sure: NDArray[np.float32], right: NDArray[np.bool_]) -> Sums:
    """Return (15,), a number a bin of confidence: how many pixels in it are right, less how many should be.

    `sure` (N,) are the probabilities of the predictions of N pixels, `right` (N,) whether they are right.
    """
    bins = np.minimum((sure * BINS).astype(np.int64), BINS - 1)
    return np.bincount(bins, right - sure.astype(np.float64), BINS).astype(np.float64)


def fit_temperature(logits: Tensor, labels: Tensor) -> tuple[float, Table]:
    """Return what logits (N, C) are divided by for the least cross-entropy with labels (N,), and a table of what that does.

    Raises a SegFitError if every label is `IGNORE_INDEX`.
    """
    from scipy.optimize import minimize_scalar

    counted = labels != IGNORE_INDEX
    logits, labels = logits[counted].double(), labels[counted].long()
    if not len(labels):
        raise SegFitError("temperature=fit: there is no pixel that counts.")

    def entropy(power: float) -> float:
        return float(cross_entropy(logits * math.exp(-power), labels))

    found = minimize_scalar(entropy, bounds=(-3, 3), method="bounded", options={"xatol": 1e-6})
    rows: list[list[Cell]] = []
    for power in (0.0, float(found.x)):
        sure, guess = (logits * math.exp(-power)).softmax(1).max(1)
        gaps = calibration_gaps(sure.numpy(), (guess == labels).numpy())
        rows.append([math.exp(power), entropy(power), float(np.abs(gaps).sum() / len(labels))])
    head = columns("temperature:.4f | cross-entropy:.4f | calibration error:.4f")
    title = f"Temperature fitted on {len(labels):,} pixels"
    return math.exp(float(found.x)), Table("temperature", title, head, rows)
