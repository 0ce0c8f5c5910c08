"""Masks in class colours, panels that show an image with its mask, prediction and errors, and the confusion matrix.

matplotlib is imported where it draws, without pyplot: no global state, no window, no backend to choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]

_LONGEST = 384  # longest side of a picture in a panel, pixels
_SHORTEST_LONGEST = 224  # below it the picture is enlarged
_NARROWEST = 112  # room for the title of a picture
_GAP = 10
_LINE = 24  # height of a line of text
_PAINT = 0.6  # share of the class colour in a panel
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_WRONG = (235, 20, 40)
_LEGEND_LIMIT = 40  # with more classes, the legend names only those that are in the picture
_TITLES = ("image", "ground truth", "prediction", "errors")
_PAIR = ("the network's image", "its mask")
_FEW, _MANY = (
    12,
    40,
)  # classes up to which cells of a confusion matrix have a decimal, or a number at all


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
    panels: Sequence[Panel], classes: Classes, captions: Sequence[str] = ("",)
) -> Picture:
    """Draw image, ground truth, prediction and errors side by side, a row a panel, as `(H, W, 3)` uint8 RGB.

    Small images are enlarged and large ones reduced. Errors are red on the image in grey. A caption is above its row, and
    a legend of the classes below all.
    """
    rows = [
        _row(_tiles(panel, classes), _TITLES, caption)
        for panel, caption in zip(panels, captions, strict=True)
    ]
    return _page(rows, panels, classes)


def pairs_image(panels: Sequence[Panel], classes: Classes) -> Picture:
    """Draw image and mask side by side, a row a panel below its name, and a legend; as `panels_image` does."""
    rows = [_row(_tiles(panel, classes)[:2], _PAIR, panel.name) for panel in panels]
    return _page(rows, panels, classes)


def _page(rows: list[Picture], panels: Sequence[Panel], classes: Classes) -> Picture:
    width = max(row.shape[1] for row in rows)
    rows = [
        np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    return np.vstack([*rows, _legend(panels, classes, width)])


def _row(tiles: Sequence[Picture], titles: Sequence[str], caption: str) -> Picture:
    """Draw pictures of one size with their titles, below a caption if there is one."""
    height, width, _ = tiles[0].shape
    slot = max(width, _NARROWEST) + _GAP
    top = _GAP + _LINE * (2 if caption else 1)
    canvas = Image.new("RGB", (slot * len(tiles) + _GAP, top + height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if caption:
        draw.text((_GAP, _GAP), caption, _INK, _font(15, bold=True))
    for index, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        left = _GAP + index * slot
        draw.text((left, top - _LINE + 2), title, _INK, _font(14))
        canvas.paste(Image.fromarray(tile), (left, top))
    return np.asarray(canvas)


def _tiles(panel: Panel, classes: Classes) -> list[Picture]:
    """Return image, ground truth, prediction and errors, `(h, w, 3)` each, at the size of a tile."""
    height, width = panel.mask.shape
    longest = max(height, width)
    scale = float(np.clip(longest, _SHORTEST_LONGEST, _LONGEST)) / longest
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = np.asarray(
        Image.fromarray(np.ascontiguousarray(rgb(panel.image))).resize(
            size, Image.Resampling.BILINEAR
        )
    )
    mask, prediction = (
        np.asarray(Image.fromarray(indices).resize(size, Image.Resampling.NEAREST))
        for indices in (panel.mask, panel.prediction)
    )
    gray = image.mean(2, keepdims=True).astype(np.uint8).repeat(3, axis=2)
    ignored = mask == IGNORE_INDEX
    errors = gray // 2 + 100
    errors[(mask != prediction) & ~ignored] = _WRONG
    errors[ignored] = _stripes(*mask.shape)[ignored]
    return [
        image,
        overlay(image, mask, classes, _PAINT),
        overlay(image, prediction, classes, _PAINT),
        errors,
    ]


def _legend(panels: Sequence[Panel], classes: Classes, width: int) -> Picture:
    """Draw the colour of every class with its name, in as many lines as the width asks for."""
    masks = [mask for panel in panels for mask in (panel.mask, panel.prediction)]
    shown = {int(index) for mask in masks for index in np.unique(mask)}
    if len(classes) <= _LEGEND_LIMIT:
        shown |= set(range(len(classes)))
    font, swatch = _font(14), 14
    entries = [(index, classes.names[index]) for index in sorted(shown) if index < len(classes)]
    entries += [(IGNORE_INDEX, "ignored")] * (IGNORE_INDEX in shown)
    places, x, y = [], _GAP, _GAP
    for _, name in entries:
        needed = swatch + 6 + round(font.getlength(name)) + 2 * _GAP
        if x > _GAP and x + needed > width:
            x, y = _GAP, y + _LINE
        places.append((x, y))
        x += needed
    canvas = Image.new("RGB", (width, y + _LINE + _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for (index, name), (x, y) in zip(entries, places, strict=True):
        color = colorize(np.full((swatch, swatch), index, np.uint8), classes)
        canvas.paste(Image.fromarray(color), (x, y + 2))
        draw.rectangle((x - 1, y + 1, x + swatch, y + swatch + 2), outline=(120, 120, 120))
        draw.text((x + swatch + 6, y), name, _INK, font)
    return np.asarray(canvas)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib

    # It brings DejaVu Sans along, which has the letters that class names are written in; Pillow's own has few beyond English.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)


def _stripes(height: int, width: int) -> Picture:
    """Return `(H, W, 3)` diagonal stripes in two greys, their width in proportion to the picture."""
    period = max(4, min(height, width) // 16)
    rows, columns = np.ogrid[:height, :width]
    light = (rows + columns) % period < period // 2
    return np.where(light[..., None], np.uint8(170), np.uint8(110)).repeat(3, axis=2)


def confusion_figure(confusion: NDArray[np.int64], classes: Classes) -> Figure:
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
