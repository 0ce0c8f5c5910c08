"""Panels that show a picture as it was, restored, as it should be, and where it is still wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Picture = NDArray[np.uint8]

_SIDE = 256  # pixels of a picture that are shown, one to one
_SHOWN = 2  # screen pixels a side for each of them, in pictures that are smaller by as much
_AMPLIFIED = 5  # errors, to be seen
_GAP, _LINE = 10, 24
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Panel:
    """A part of a held-out picture, pixel by pixel."""

    name: str  # the sample's id
    parts: dict[str, Picture]  # title → (h, w, 3) uint8


def panel_of(name: str, degraded: Tensor, restored: Tensor, target: Tensor) -> Panel:
    """Return the part of 256 × 256 pixels, or less, in which the restored picture is most wrong.

    Pictures are (C, H, W) float; the target lies in [0, 1].
    """
    error = (restored.clamp(0, 1) - target).abs().mean(0, keepdim=True)
    height, width = (min(side, _SIDE) for side in target.shape[-2:])
    step = _SIDE // 4
    means = F.avg_pool2d(error[None], (height, width), step)[0, 0]
    place = int(means.argmax())  # synchronises
    top, left = (step * steps for steps in divmod(place, means.shape[1]))
    area = (..., slice(top, top + height), slice(left, left + width))
    parts = {
        "input": degraded[area],
        "restored": restored[area],
        "target": target[area],
        f"error × {_AMPLIFIED}": _AMPLIFIED * error[area],
    }
    return Panel(name, {title: _shown(part) for title, part in parts.items()})


def draw(panels: Sequence[Panel], captions: Sequence[str] = ("",)) -> Picture:
    """Draw one row a panel (one at least) below its caption, if it has one; return `(H, W, 3)` uint8 RGB."""
    rows = [_row(panel, caption) for panel, caption in zip(panels, captions, strict=True)]
    width = max(row.shape[1] for row in rows)
    rims = [((0, 0), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(row, rim, constant_values=255) for row, rim in zip(rows, rims, strict=True)]
    return np.vstack(padded)


def _row(panel: Panel, caption: str) -> Picture:
    height, width = next(iter(panel.parts.values())).shape[:2]
    scale = _SHOWN if max(height, width) <= _SIDE // _SHOWN else 1
    top = _GAP + _LINE * (2 if caption else 1)
    slot = max(width * scale, 90) + _GAP
    size = (slot * len(panel.parts) + _GAP, top + height * scale)
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    if caption:
        pen.text((_GAP, _GAP), caption, _INK, _font(15, "-Bold"))
    for place, (title, part) in enumerate(panel.parts.items()):
        left = _GAP + place * slot
        pen.text((left, top - _LINE + 2), title, _INK, _font(14))
        tile = part.repeat(scale, axis=0).repeat(scale, axis=1)
        canvas.paste(Image.fromarray(tile), (left, top))
    return np.asarray(canvas)


def _shown(part: Tensor) -> Picture:
    """Return (1 or 3, h, w) float as (h, w, 3) uint8."""
    levels = part.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()  # synchronises


@cache
def _font(size: int, weight: str = "") -> ImageFont.FreeTypeFont:
    # matplotlib brings DejaVu Sans along, which has the letters of most names.
    name = f"DejaVuSans{weight}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
