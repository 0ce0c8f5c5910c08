"""Masks in class colours, panels that show an image with its mask, prediction and errors, and the confusion matrix.

matplotlib is imported where it draws, without pyplot: no global state, no window, no backend to choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from segfit.report.panels import GAP, INK, LINE, PAPER, Picture, draw_rows, font
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST = 384  # longest side of a picture in a panel, pixels
_SHORTEST_LONGEST = 224  # below it the picture is enlarged
_PAINT = 0.6  # share of the class colour in a panel
_WRONG = (235, 20, 40)
TITLES = ("image", "ground truth", "prediction", "errors")
_LEGEND_LIMIT = 40  # with more classes, the legend names only those that are in the picture
# Classes up to which cells of a confusion matrix have a decimal, or a number at all.
_FEW, _MANY = 12, 40


@dataclass(frozen=True)
class Panel:
    """A held-out image beside its mask and prediction."""

    name: str  # the sample's id
    image: Picture  # (H, W, C) uint8, RGB or bands
    mask: Picture  # (H, W) uint8 ground truth, 255 ignored
    prediction: Picture  # (H, W) uint8


def colorize(mask: Picture, classes: Classes) -> Picture:
    """Return a mask `(H, W)` uint8 in class colours, `(H, W, 3)` uint8 RGB; ignored pixels are grey diagonal stripes."""
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(classes)] = classes.colors
    painted = colors[mask]
    ignored = mask == IGNORE_INDEX
    painted[ignored] = _stripes(*mask.shape)[ignored]
    return painted


def rgb(image: Picture) -> Picture:
    """Return an image (H, W, C) uint8 as it is shown, `(H, W, 3)`: its first three bands, or its first one as grey."""
    return image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)


def overlay(image: Picture, mask: Picture, classes: Classes, alpha: float = 0.5) -> Picture:
    """Return an image `(H, W, C)` uint8 with its mask `(H, W)` uint8 painted over it.

    The background stays as it is, ignored pixels are striped. `alpha` is the share (0-1) of the class colours.
    """
    image = rgb(image)
    blended = (image * (1 - alpha) + colorize(mask, classes) * alpha).round().astype(np.uint8)
    if classes.background is not None:
        untouched = mask == classes.background
        blended[untouched] = image[untouched]
    return blended


def panels_image(
    panels: Sequence[Panel],
    classes: Classes,
    captions: Sequence[str] = ("",),
    titles: Sequence[str] = TITLES,
) -> Picture:
    """Draw image, ground truth, prediction and errors side by side, a row a panel, as `(H, W, 3)` uint8 RGB.

    Small images are enlarged and large ones reduced. Errors are red on the image in grey. A caption is above its row, and
    a legend of the classes below all. There are as many columns as `titles`.
    """
    rows = [
        (caption, dict(zip(titles, _tiles(panel, classes), strict=False)))
        for panel, caption in zip(panels, captions, strict=True)
    ]
    page = draw_rows(rows)
    return np.vstack([page, _legend(panels, classes, page.shape[1])])


def _tiles(panel: Panel, classes: Classes) -> list[Picture]:
    """Return image, ground truth, prediction and errors, `(h, w, 3)` each, at the size of a tile."""
    height, width = panel.mask.shape
    longest = max(height, width)
    scale = float(np.clip(longest, _SHORTEST_LONGEST, _LONGEST)) / longest
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    shown = Image.fromarray(np.ascontiguousarray(rgb(panel.image)))
    image = np.asarray(shown.resize(size, Image.Resampling.BILINEAR))
    mask, prediction = (
        np.asarray(Image.fromarray(indices).resize(size, Image.Resampling.NEAREST))
        for indices in (panel.mask, panel.prediction)
    )
    gray = image.mean(2, keepdims=True).astype(np.uint8).repeat(3, axis=2)
    ignored = mask == IGNORE_INDEX
    errors = gray // 2 + 100
    errors[(mask != prediction) & ~ignored] = _WRONG
    errors[ignored] = _stripes(*mask.shape)[ignored]
    painted = (overlay(image, indices, classes, _PAINT) for indices in (mask, prediction))
    return [image, *painted, errors]


def _legend(panels: Sequence[Panel], classes: Classes, width: int) -> Picture:
    """Draw the colour of every class with its name, in as many lines as the width asks for."""
    shown = set(range(len(classes))) if len(classes) <= _LEGEND_LIMIT else set()
    for panel in panels:
        shown.update(np.unique([panel.mask, panel.prediction]).tolist())
    names = {**dict(enumerate(classes.names)), IGNORE_INDEX: "ignored"}
    canvas = Image.new("RGB", (width, LINE * len(shown) + 2 * GAP), PAPER)
    pen, text, swatch, x, y = ImageDraw.Draw(canvas), font(14), 14, GAP, GAP
    for index in sorted(shown & names.keys()):
        needed = swatch + 6 + round(text.getlength(names[index])) + 2 * GAP
        if x > GAP and x + needed > width:
            x, y = GAP, y + LINE
        color = colorize(np.full((swatch, swatch), index, np.uint8), classes)
        canvas.paste(Image.fromarray(color), (x, y + 2))
        pen.rectangle((x - 1, y + 1, x + swatch, y + swatch + 2), outline=(120, 120, 120))
        pen.text((x + swatch + 6, y), names[index], INK, text)
        x += needed
    return np.asarray(canvas)[: y + LINE + GAP]


def _stripes(height: int, width: int) -> Picture:
    """Return `(H, W, 3)` diagonal stripes in two greys, their width in proportion to the picture."""
    period = max(4, min(height, width) // 16)
    rows, columns = np.ogrid[:height, :width]
    light = (rows + columns) % period < period // 2
    return np.where(light[..., None], np.uint8(170), np.uint8(110)).repeat(3, axis=2)


def confusion_figure(confusion: NDArray[np.int64], classes: Classes) -> "Figure":
    """Draw a confusion matrix: each row is a class of the ground truth, in percent of its pixels.

    Rows without a pixel are grey. `confusion` is `(C, C)` pixels, rows ground truth, columns prediction.
    """
    import matplotlib
    from matplotlib.figure import Figure

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
        # Cells that would read 0 stay empty: in a large matrix the errors have to be visible.
        text = format(value, spec)
        if count <= _MANY and not np.isnan(value) and float(text) > 0:
            color = "white" if value > 55 else "black"
            axes.text(column, row, text, ha="center", va="center", size=size, color=color)
    return figure
