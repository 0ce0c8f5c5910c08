"""From a model's logits to logits and class indices at an image's own size."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.data.tiles import LargeImage, Span, strips
from segfit.engine.task import Forward

_CPU_PIXELS = 2**18  # of windows at once; with more, features leave a CPU's cache
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
    """How images become logits."""

    window: tuple[int, int] | None = None  # (height, width) of a sliding one; None: whole images
    overlap: float = 0.5  # share (0-1) of a window that the next one covers again
    flip: bool = False  # average with the prediction of the mirrored image, or window
    swap: Sequence[Sequence[int]] = ()  # pairs of classes that a mirror image exchanges
    at_once: int = 1  # windows that a forward pass takes

    def __call__(self, forward: Forward, images: Tensor) -> Tensor:
        """Return logits (B, num_classes, h, w) of images (B, 3, h, w)."""
        logits = forward(images)
        if self.flip:
            mirrored = forward(images.flip(-1)).flip(-1)
            for one, other in self.swap:
                mirrored[:, [one, other]] = mirrored[:, [other, one]]  # synchronises
            logits = (logits + mirrored) / 2
        return logits

    def windows(
        self, forward: Forward, image: Tensor | LargeImage, device: torch.device, home: torch.device
    ) -> Iterator[Tensor]:
        """Yield the logits (num_classes, h, W) of an image (3, H, W) from top to bottom, on `home`; `forward` is on `device`.

        Black surrounds an image that is smaller than a window, as in training.
        """
        assert self.window is not None
        _, height, width = image.shape
        rows, columns = (
            _spans(max(side, length), length, self.overlap)
            for side, length in zip((height, width), self.window, strict=True)
        )

        def cut(y: slice, x: slice) -> Tensor:
            part = image[:, y, x].to(device)
            rim = y.stop - y.start - part.shape[1], x.stop - x.start - part.shape[2]
            return F.pad(part, (0, rim[1], 0, rim[0])) if any(rim) else part

        at_once = self.at_once
        if device.type == "cpu":
            at_once = max(1, min(at_once, _CPU_PIXELS // math.prod(self.window)))
        for strip in strips(
            partial(self, forward), cut, rows, columns, batch_size=at_once, home=home
        ):
            yield strip[:, :height, :width]  # no image below its window has a second strip


def _spans(length: int, window: int, overlap: float) -> list[Span]:
    """Return windows that cover `length` (>= `window`), the last one flush."""
    stride = max(1, round(window * (1 - overlap)))
    starts = [*range(0, length - window, stride), length - window]
    return [(start, start + window) for start in starts]


def logits_at(logits: Tensor, height: int, width: int) -> Iterator[Tensor]:
    """Yield logits (B, C, h, w) upsampled bilinearly to (B, C, height, width), as `F.interpolate` does, in strips of rows.

    A large image never has its full-size logits in memory.
    """
    if logits.shape[-2:] == (height, width):
        yield logits
        return
    fake_mode = getattr(logits, "fake_mode", None)  # of benchmark=plan: its tensors stay in it
    upper, lower, share = _kept_neighbours(logits.shape[-2], height, logits.device, fake_mode)
    rows = max(1, _STRIP_ELEMENTS // (logits.shape[0] * logits.shape[1] * width))
    for start in range(0, height, rows):
        part = slice(start, start + rows)
        strip = torch.lerp(logits[:, :, upper[part]], logits[:, :, lower[part]], share[part, None])
        if strip.shape[-1] != width:
            size = (strip.shape[-2], width)
            strip = F.interpolate(strip, size, mode="bilinear", align_corners=False)
        yield strip


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


@lru_cache(maxsize=256)  # sizes come back from image to image
def _kept_neighbours(source: int, target: int, device: torch.device, _: object) -> list[Tensor]:
    with torch.inference_mode(False):
        parts = _neighbours(torch.tensor(source), target)
        return [part.to(device) for part in parts]  # synchronises, once a size
