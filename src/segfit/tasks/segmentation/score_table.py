"""The scores of each class as a table."""

from collections.abc import Collection

import numpy as np

from segfit.engine.findings import Cell, Column, Table
from segfit.report.text import number
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.scores import Scores

_COLUMNS = (
    Column("class"),
    *(Column(name, ".4f") for name in ("IoU", "F1", "accuracy")),
    Column("pixels", ","),
    Column("share", ".1%"),
)


def score_table(scores: Scores, classes: Classes) -> Table:
    """Return IoU, F1 and accuracy of every class, its ground-truth pixels, and the means over the classes.

    A class that is not in the ground truth has no score (None) and counts in no mean. With a background, the means over
    the foreground are shown too.
    """
    truth = scores.confusion.sum(1).tolist()
    whole = max(sum(truth), 1)
    rows = [
        [name, *(values[name] for values in scores.per_class.values()), pixels, pixels / whole]
        for name, pixels in zip(classes.names, truth, strict=True)
    ]
    totals = [_mean("macro mean", scores, classes.names)]
    if classes.background is not None:
        background = classes.names[classes.background]
        names = [name for name in classes.names if name != background]
        totals.append(_mean("foreground mean", scores, names))
    return Table(
        "per_class",
        "",
        _COLUMNS,
        rows,
        totals=totals,
        colors=classes.colors,
        caption=f"pixel accuracy {number(scores.scores['pixel_accuracy'])}",
    )


def _mean(title: str, scores: Scores, names: Collection[str]) -> list[Cell]:
    """Return the means over classes that are in the ground truth."""
    means: list[Cell] = [title]
    for values in scores.per_class.values():
        present = [values[name] for name in names if values[name] is not None]
        means.append(float(np.mean(present)) if present else None)  # type: ignore[arg-type]
    return [*means, "", ""]
