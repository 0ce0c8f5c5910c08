"""Rows of titled pictures on one page."""

import io
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]

GAP = 10
LINE = 24  # height of a line of text
INK, PAPER = (30, 30, 30), (255, 255, 255)
_NARROWEST = 112  # room for the title of a picture


def encoded(picture: Picture | Image.Image, kind: str = "png", **options: Any) -> bytes:
    """Return a picture, (H, W) or (H, W, 3) uint8 or Pillow's, as a file of a format of Pillow's, with its options."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


def draw_rows(rows: Sequence[tuple[str, Mapping[str, Picture]]]) -> Picture:
    """Return `(H, W, 3)` uint8 RGB: below each caption, if there is one, pictures of one size `(h, w, 3)` by their titles."""
    drawn = [_row(caption, tiles) for caption, tiles in rows]
    width = max(row.shape[1] for row in drawn)
    rims = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in drawn]
    return np.vstack(
        [np.pad(row, rim, constant_values=255) for row, rim in zip(drawn, rims, strict=True)]
    )


def _row(caption: str, tiles: Mapping[str, Picture]) -> Picture:
    height, width, _ = next(iter(tiles.values())).shape
    slot = max(width, _NARROWEST) + GAP
    top = GAP + LINE * (2 if caption else 1)
    canvas = Image.new("RGB", (slot * len(tiles) + GAP, top + height), PAPER)
    pen = ImageDraw.Draw(canvas)
    if caption:
        pen.text((GAP, GAP), caption, INK, font(15, bold=True))
    for left, (title, tile) in zip(range(GAP, canvas.width, slot), tiles.items(), strict=False):
        pen.text((left, top - LINE + 2), title, INK, font(14))
        canvas.paste(Image.fromarray(tile), (left, top))
    return np.asarray(canvas)


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has the letters of most names; Pillow's own font has few beyond English."""
    import matplotlib  # brings it along

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
