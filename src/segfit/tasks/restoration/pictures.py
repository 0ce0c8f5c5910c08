"""Panels that show a picture as it was, restored, as it should be, and where it is still wrong."""

import torch.nn.functional as F
from torch import Tensor

from segfit.report.panels import Picture

_SIDE = 256  # pixels of a picture that are shown, one to one
_SHOWN = 2  # screen pixels a side for each of them, in pictures that are smaller by as much
_AMPLIFIED = 5  # errors, to be seen


def panel_of(degraded: Tensor, restored: Tensor, target: Tensor) -> dict[str, Picture]:
    """Return, title → (h, w, 3) uint8, the part of 256 × 256 pixels, or less, in which the restored picture is most wrong.

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
    return {title: shown(part) for title, part in parts.items()}


def shown(part: Tensor) -> Picture:
    """Return (1 or 3, h, w) float as (h, w, 3) uint8, or twice as high and wide where it is small."""
    levels = part.clamp(0, 1).mul(255).round().byte().expand(3, -1, -1)
    scale = _SHOWN if max(part.shape) <= _SIDE // _SHOWN else 1
    return levels.permute(1, 2, 0).cpu().numpy().repeat(scale, 0).repeat(scale, 1)  # synchronises
