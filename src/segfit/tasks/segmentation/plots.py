"""Figures by matplotlib, without pyplot: no global state, no window, no backend to choose."""

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from segfit.tasks.segmentation.classes import Classes

_FEW, _MANY = 12, 40  # classes up to which cells have a decimal, or a number at all


def confusion_figure(confusion: NDArray[np.int64], classes: Classes) -> Figure:
    """Draw a confusion matrix: each row is a class of the ground truth, in percent of its pixels.

    Rows without a pixel are grey. `confusion` is `(C, C)` pixels, rows ground truth, columns prediction.
    """
    count = len(classes)
    pixels = confusion.sum(1, keepdims=True)
    percent = np.where(pixels > 0, 100 * confusion / np.maximum(pixels, 1), np.nan)

    side = float(np.clip(0.42 * count + 2.2, 4.4, 20))
    figure = Figure(figsize=(side + 0.8, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#dddddd")
    image = axes.imshow(percent, cmap=colors, vmin=0, vmax=100)
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8, pad=0.02)
    size = 10 if count <= _FEW else 9 if count <= _MANY else 6
    axes.set(xlabel="prediction", ylabel="ground truth")
    axes.set_yticks(range(count), classes.names, size=size)
    axes.set_xticks(
        range(count), classes.names, size=size, rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="#eeeeee", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    spec, size = (".1f", 9) if count <= _FEW else (".0f", 8)
    for (row, column), value in np.ndenumerate(percent):
        # Cells that would read 0 stay empty: in a large matrix the errors have to stand out.
        if count <= _MANY and not np.isnan(value) and float(format(value, spec)) > 0:
            color = "white" if value > 55 else "black"
            axes.text(
                column, row, format(value, spec), ha="center", va="center", size=size, color=color
            )
    return figure
