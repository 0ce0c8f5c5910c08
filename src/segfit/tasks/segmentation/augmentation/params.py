"""What augmentation may do, and what it does to an image: drawn in one place, for both pipelines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segfit.tasks.segmentation.schema import AugmentationConfig

TAPS_PER_SIGMA = 3  # a Gaussian is cut off here; less than 0.3 % of its weight is lost


@dataclass(kw_only=True)
class AugmentationOptions(AugmentationConfig):
    """The operations of the config, without `mixup` and `cutmix`.

    In this order: brightness, contrast, saturation, hue, flips, rotation and zoom, blur, noise. Colours
    come first, so that neither the mean of `contrast` nor the colour of `fill` depends on the other.
    """

    # Each channel in 0-1 of what lies outside the frame: the mean that the model's input is normalised by makes it 0 there, so
    # that it moves no statistics.
    fill: Sequence[float] = (0.485, 0.456, 0.406)

    def mirrored(self, masks: Tensor) -> Tensor:
        """Return mirrored masks, of any shape and dtype, with the classes of `swap` exchanged."""
        result = masks.clone() if self.swap else masks
        for one, other in self.swap or ():
            result.masked_fill_(masks == one, other).masked_fill_(masks == other, one)
        return result

    def blur_radius(self, height: int, width: int) -> int:
        """Return the reach of the widest blur, in pixels; reflection needs it inside the image."""
        reach = int(TAPS_PER_SIGMA * max(self.blur_sigma) + 1)
        return min(reach, height - 1, width - 1)


@dataclass(frozen=True)
class Draws:
    """What happens to each of B images: host tensors `(B,)`, bool for whether it happens, else float32."""

    hflip: Tensor
    vflip: Tensor
    affine: Tensor
    angle: Tensor  # degrees, clockwise as seen
    zoom: Tensor
    shift_x: Tensor  # of the centre by the zoom, in widths of the image; + is right
    shift_y: Tensor  # in heights; + is down
    color_jitter: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    blur: Tensor
    sigma: Tensor
    noise: Tensor
    noise_seed: int


def draw(options: AugmentationOptions, count: int, seed: int) -> Draws:
    """Draw what happens to `count` images; the seed decides, global generators are not used.

    All numbers are drawn in any case, so that changing the probability of one operation leaves the others as they were.
    """
    generator = torch.Generator().manual_seed(seed)
    columns: Iterator[Tensor] = iter(torch.rand(15, count, generator=generator))

    def happens(probability: float) -> Tensor:
        return next(columns) < probability

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(columns)

    low, high = torch.tensor(options.scale).log().tolist()
    zoom = between(low, high).exp()
    # What is zoomed about a point p that stays where it is: x → zoom·x + (1 - zoom)·p.
    reach = (1 - zoom) * float(options.zoom_anywhere)
    return Draws(
        hflip=happens(options.hflip),
        vflip=happens(options.vflip),
        affine=happens(options.affine),
        angle=between(-options.degrees, options.degrees),
        zoom=zoom,
        shift_x=reach * between(-0.5, 0.5),
        shift_y=reach * between(-0.5, 0.5),
        color_jitter=happens(options.color_jitter),
        brightness=between(1 - options.brightness, 1 + options.brightness),
        contrast=between(1 - options.contrast, 1 + options.contrast),
        saturation=between(1 - options.saturation, 1 + options.saturation),
        hue=between(-options.hue, options.hue),
        blur=happens(options.blur),
        sigma=between(*options.blur_sigma),
        noise=happens(options.noise),
        noise_seed=int(torch.randint(2**62, (), generator=generator)),
    )
