"""What augmentation may do and what it does to an image, drawn in one place; images by torchvision in the data workers; mixing.

`KorniaGpu` in `kornia_gpu` does the same to batches on the device.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from segfit.tasks.segmentation.classes import IGNORE_INDEX
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


def draw(options: AugmentationOptions, count: int, seed: int) -> dict[str, Tensor]:
    """Draw what happens to `count` images; the seed decides, global generators are not used.

    Returns host tensors `(count,)` by name: bool for whether an operation happens, else float32. "angle" is in degrees,
    clockwise as seen; "shift_x" and "shift_y", of the centre by the zoom, in widths and heights of the image, + is right and
    down; "noise_seed" is one number. All numbers are drawn in any case, so that changing the probability of one operation
    leaves the others as they were.
    """
    generator = torch.Generator().manual_seed(seed)
    columns: Iterator[Tensor] = iter(torch.rand(15, count, generator=generator))

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * next(columns)

    low, high = torch.tensor(options.scale).log().tolist()
    zoom = between(low, high).exp()
    # What is zoomed about a point p that stays where it is: x → zoom·x + (1 - zoom)·p.
    reach = (1 - zoom) * float(options.zoom_anywhere)
    return {
        "zoom": zoom,
        "hflip": next(columns) < options.hflip,
        "vflip": next(columns) < options.vflip,
        "affine": next(columns) < options.affine,
        "angle": between(-options.degrees, options.degrees),
        "shift_x": reach * between(-0.5, 0.5),
        "shift_y": reach * between(-0.5, 0.5),
        "color_jitter": next(columns) < options.color_jitter,
        "brightness": between(1 - options.brightness, 1 + options.brightness),
        "contrast": between(1 - options.contrast, 1 + options.contrast),
        "saturation": between(1 - options.saturation, 1 + options.saturation),
        "hue": between(-options.hue, options.hue),
        "blur": next(columns) < options.blur,
        "sigma": between(*options.blur_sigma),
        "noise": next(columns) < options.noise,
        "noise_seed": torch.randint(2**62, (), generator=generator),
    }


class CpuAugment(AugmentationOptions):
    """Augments one image and its mask, by torchvision v2 on uint8."""

    def __call__(self, image: Tensor, mask: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return the augmented image and mask; the arguments stay as they are, the seed decides everything.

        Images are `(C, H, W)` uint8, RGB or bands, which have no saturation and no hue; masks `(H, W)` uint8 class indices
        and `IGNORE_INDEX`. What came from outside the frame is `fill` and `IGNORE_INDEX`.
        """
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2 import functional as F

        drawn = {name: value.item() for name, value in draw(self, 1, seed).items()}
        if drawn["color_jitter"]:
            colors = image if len(image) == 3 else image[:, None]  # bands are grey images
            colors = F.adjust_brightness(colors, drawn["brightness"])
            colors = F.adjust_contrast(colors, drawn["contrast"])
            if len(image) == 3:
                colors = F.adjust_saturation(colors, drawn["saturation"])
                # The slowest operation, and grey data sets switch it off.
                colors = F.adjust_hue(colors, drawn["hue"]) if self.hue else colors
            image = colors.reshape(image.shape)
        if drawn["hflip"]:
            image, mask = image.flip(-1), mask.flip(-1)
        if drawn["vflip"]:
            image, mask = image.flip(-2), mask.flip(-2)
        if drawn["hflip"] != drawn["vflip"]:  # both make a turn
            mask = self.mirrored(mask)
        if drawn["affine"]:
            height, width = mask.shape
            moves: dict[str, Any] = {
                "angle": drawn["angle"],
                "translate": [drawn["shift_x"] * width, drawn["shift_y"] * height],
                "scale": drawn["zoom"],
                "shear": [0.0, 0.0],
            }
            fill = [round(255 * value) for value in self.fill]
            image = F.affine(image, **moves, interpolation=InterpolationMode.BILINEAR, fill=fill)
            mask = F.affine(mask[None], **moves, fill=[IGNORE_INDEX])[0]  # nearest
        if drawn["blur"]:
            side = 2 * self.blur_radius(*mask.shape) + 1
            image = F.gaussian_blur(image, [side, side], [drawn["sigma"]])
        if drawn["noise"]:
            # Not torchvision's gaussian_noise: it draws from the global generator.
            generator = torch.Generator().manual_seed(int(drawn["noise_seed"]))
            noise = torch.randn(image.shape, generator=generator).mul_(255 * self.noise_std)
            image = noise.add_(image).round_().clamp_(0, 255).to(torch.uint8)
        return image, mask


@dataclass(kw_only=True)
class Mix(AugmentationConfig):
    """Mixes each image with another of its batch; a batch is mixed by one of the two, or not at all.

    MixUp (Zhang et al., arXiv 1710.09412) blends images and labels, which makes soft targets. CutMix
    (Yun et al., arXiv 1905.04899) pastes a rectangle, labels and all: targets stay hard.

    The other operations of the config are none of its own; the probabilities add up to 1 at most.
    """

    num_classes: int

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return mixed images and their targets; the arguments stay as they are. A single image is not mixed.

        Images are `(B, 3, H, W)` float, masks `(B, H, W)` int64 class indices and `IGNORE_INDEX`, targets hard
        `(B, H, W)` int64, or after MixUp soft `(B, C, H, W)` of the images' dtype. The seed decides everything; global
        generators are not used.
        """
        random = Random(seed)
        choice = random.random()
        if len(images) == 1 or choice >= self.mixup + self.cutmix:
            return images, masks
        # A rotation of the batch: each image gets another one, and no index goes to the device.
        partner = random.randrange(1, len(images))
        if choice < self.mixup:
            share = random.betavariate(self.mixup_alpha, self.mixup_alpha)
            classes = torch.arange(self.num_classes, device=masks.device).view(1, -1, 1, 1)
            own = (masks.unsqueeze(1) == classes).to(images.dtype)
            ignored = masks == IGNORE_INDEX
            ignored = (ignored | ignored.roll(partner, 0)).unsqueeze(1)
            targets = torch.lerp(own.roll(partner, 0), own, share).masked_fill_(ignored, 0)
            return torch.lerp(images.roll(partner, 0), images, share), targets
        share = random.betavariate(self.cutmix_alpha, self.cutmix_alpha)
        rows, columns = (_span(random, size, (1 - share) ** 0.5) for size in masks.shape[1:])
        images, masks = images.clone(), masks.clone()
        for batch in (images, masks):
            batch[..., rows, columns] = batch[..., rows, columns].roll(partner, 0)
        return images, masks


def _span(random: Random, size: int, share: float) -> slice:
    """Return this share of an axis about a random place, clipped at the border as in CutMix's paper."""
    half = round(size * share / 2)
    centre = random.randrange(size)
    return slice(max(centre - half, 0), min(centre + half, size))
