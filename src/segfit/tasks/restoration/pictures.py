"""Panels that show a picture as it was, restored, as it should be, and where it is still wrong."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from segfit.report.panels import Picture, draw_rows

_SIDE = 256  # pixels of a picture that are shown, one to one
_SHOWN = 2  # screen pixels a side for each of them, in pictures that are smaller by as much
_AMPLIFIED = 5  # errors, to be seen


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
    return Panel(name, {title: shown(part) for title, part in parts.items()})


def draw(panels: Sequence[Panel], captions: Sequence[str] = ("",)) -> Picture:
    """Draw one row a panel (one at least) below its caption, if it has one; return `(H, W, 3)` uint8 RGB."""
    return draw_rows(
        [
            (caption, {title: _enlarged(part) for title, part in panel.parts.items()})
            for panel, caption in zip(panels, captions, strict=True)
        ]
    )


def _enlarged(part: Picture) -> Picture:
    scale = _SHOWN if max(part.shape) <= _SIDE // _SHOWN else 1
    return part.repeat(scale, axis=0).repeat(scale, axis=1)


def shown(part: Tensor) -> Picture:
    """Return (1 or 3, h, w) float as (h, w, 3) uint8."""
    levels = part.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1)
    return levels.permute(1, 2, 0).contiguous().cpu().numpy()  # synchronises
