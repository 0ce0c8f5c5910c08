"""Scores of evaluate.py besides those of training: boundaries, missed objects, and how far probabilities can be believed.

docs/metrics.md is the contract.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import cross_entropy

from segfit.engine.findings import Cell, Column, Table
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.scores import share

Pixels = NDArray[np.uint8]
Sums = NDArray[np.float64]
BINS = 15  # of probabilities, of equal width, as in Guo et al., arXiv 1706.04599


def boundary_counts(prediction: Pixels, truth: Pixels, classes: Classes, tolerance: float) -> Sums:
    """Return (6, C) of a prediction and its ground truth (H, W), class indices; the truth may hold `IGNORE_INDEX`.

    Of each class: predicted boundary pixels within `tolerance` pixels of a true one, all of them; true ones within it of a
    predicted one, all of them; objects that are missed, all of them.
    """
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
    """Return (15,): by how many more pixels than expected are right, of those that are as sure as a bin says.

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
    columns = [Column(one, ".4f") for one in ("temperature", "cross-entropy", "calibration error")]
    title = f"Temperature fitted on {len(labels):,} pixels"
    return math.exp(float(found.x)), Table("temperature", title, columns, rows)
