"""From a model's logits to logits and class indices at an image's own size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.engine.task import Forward

_STRIP_ELEMENTS = 2**24  # 64 MiB of fp32 logits at once, however large the image


class Ensemble(nn.Module):
    """Models as one: images (B, 3, H, W) → the logarithm of their mean probabilities, (B, num_classes, H, W) float32."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits whose softmax is the mean."""
        parts = [model(images).float().log_softmax(1) for model in self.models]
        return torch.stack(parts).logsumexp(0) - math.log(len(parts))


@dataclass(frozen=True)
class Predictor:
    """How images become logits.

    Args:
        window: (height, width) of a sliding window, or None to predict whole images.
        overlap: share (0-1) of a window that the next one covers again.
        flip: average with the prediction of the mirrored image.
        swap: pairs of classes that a mirror image exchanges.
    """

    window: tuple[int, int] | None = None
    overlap: float = 0.5
    flip: bool = False
    swap: Sequence[Sequence[int]] = ()

    def __call__(self, forward: Forward, images: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W) of normalised images (B, 3, H, W)."""
        logits = self._windows(forward, images)
        if self.flip:
            mirrored = self._windows(forward, images.flip(-1)).flip(-1)
            for one, other in self.swap:
                mirrored[:, [one, other]] = mirrored[:, [other, one]]  # synchronises
            logits = (logits + mirrored) / 2
        return logits

    def _windows(self, forward: Forward, images: Tensor) -> Tensor:
        if self.window is None:
            return forward(images)
        rows, columns = self.window
        height, width = max(images.shape[-2], rows), max(images.shape[-1], columns)
        padded = F.pad(images, (0, width - images.shape[-1], 0, height - images.shape[-2]))
        total: Tensor | None = None
        count = padded.new_zeros(1, 1, height, width)
        for top in window_starts(height, rows, self.overlap):
            for left in window_starts(width, columns, self.overlap):
                area = (..., slice(top, top + rows), slice(left, left + columns))
                logits = forward(padded[area].contiguous())
                if total is None:
                    total = logits.new_zeros(len(images), logits.shape[1], height, width)
                total[area] += logits
                count[area] += 1
        assert total is not None  # there is always a first window
        return (total / count)[..., : images.shape[-2], : images.shape[-1]]


def window_starts(length: int, window: int, overlap: float) -> list[int]:
    """Return where windows begin so that they cover `length` (>= `window`), the last one flush."""
    stride = max(1, round(window * (1 - overlap)))
    return [*range(0, length - window, stride), length - window]


def classes_at(logits: Tensor, height: int, width: int) -> Tensor:
    """Return the argmax (B, height, width) int64 of logits (B, C, h, w) upsampled bilinearly to that size.

    As `F.interpolate` and argmax, but in strips of rows: a large image never has its full-size logits in memory.
    """
    if logits.shape[-2:] == (height, width):
        return logits.argmax(1)
    fake_mode = getattr(logits, "fake_mode", None)  # of benchmark=plan: its tensors stay in it
    upper, lower, share = _kept_neighbours(logits.shape[-2], height, logits.device, fake_mode)
    rows = max(1, _STRIP_ELEMENTS // (logits.shape[0] * logits.shape[1] * width))
    strips = []
    for start in range(0, height, rows):
        part = slice(start, start + rows)
        strip = torch.lerp(logits[:, :, upper[part]], logits[:, :, lower[part]], share[part, None])
        if strip.shape[-1] != width:
            size = (strip.shape[-2], width)
            strip = F.interpolate(strip, size, mode="bilinear", align_corners=False)
        strips.append(strip.argmax(1))
    return torch.cat(strips, 1)


def resize_logits(logits: Tensor, axis: int, target: int, start: Tensor, content: Tensor) -> Tensor:
    """Return logits `(…, H, W)` of which `content` rows or columns from `start` on are upsampled bilinearly to `target`."""
    low, high, share = _neighbours(content, target)
    first, second = (logits.index_select(axis, (part + start).long()) for part in (low, high))
    return torch.lerp(first, second, share[:, None] if axis == -2 else share)


def _neighbours(source: Tensor, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return for each of `target` rows the two of `source` (a number) and the second one's share (half-pixel centres)."""
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    centre = torch.minimum(centre.clamp(min=0), source - 1)
    first = centre.floor()
    second = torch.minimum(first + 1, source - 1)
    return first.long(), second.long(), (centre - first).float()


@lru_cache(maxsize=256)  # sizes come back from image to image, and a copy makes the host wait
def _kept_neighbours(source: int, target: int, device: torch.device, _: object) -> list[Tensor]:
    with torch.inference_mode(False):
        return [part.to(device) for part in _neighbours(torch.tensor(source), target)]
