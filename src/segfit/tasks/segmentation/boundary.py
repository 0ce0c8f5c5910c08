"""How near predicted boundaries are to the true ones, and which objects are missed; docs/metrics.md is the contract."""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.scores import share

Pixels = NDArray[np.uint8]
Sums = NDArray[np.float64]


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
