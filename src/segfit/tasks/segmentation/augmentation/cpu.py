"""Augmentation of one image at a time, in the data workers: torchvision v2 on uint8."""

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from segfit.tasks.segmentation.augmentation.params import AugmentationOptions, Draws, draw
from segfit.tasks.segmentation.classes import IGNORE_INDEX


class CpuAugment(AugmentationOptions):
    """Augments one image and its mask; options and their meaning: `AugmentationOptions`."""

    def __call__(self, image: Tensor, mask: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return the augmented image and mask; the arguments stay as they are, the seed decides everything.

        Images are `(C, H, W)` uint8, RGB or bands, which have no saturation and no hue; masks `(H, W)` uint8 class indices and `IGNORE_INDEX`. What came from outside
        the frame is `fill` and `IGNORE_INDEX`.
        """
        drawn = draw(self, 1, seed)
        if drawn.color_jitter:
            colors = image if len(image) == 3 else image[:, None]  # bands are grey images
            colors = F.adjust_brightness(colors, drawn.brightness.item())
            colors = F.adjust_contrast(colors, drawn.contrast.item())
            if len(image) == 3:
                colors = F.adjust_saturation(colors, drawn.saturation.item())
                # The slowest operation, and grey data sets switch it off.
                colors = F.adjust_hue(colors, drawn.hue.item()) if self.hue else colors
            image = colors.reshape(image.shape)
        if drawn.hflip:
            image, mask = image.flip(-1), mask.flip(-1)
        if drawn.vflip:
            image, mask = image.flip(-2), mask.flip(-2)
        if drawn.hflip != drawn.vflip:  # both make a turn
            mask = self.mirrored(mask)
        if drawn.affine:
            fill = [round(255 * value) for value in self.fill]
            image = _rotate_and_zoom(image, drawn, InterpolationMode.BILINEAR, fill)
            nearest = InterpolationMode.NEAREST
            mask = _rotate_and_zoom(mask[None], drawn, nearest, [IGNORE_INDEX])[0]
        if drawn.blur:
            side = 2 * self.blur_radius(*mask.shape) + 1
            image = F.gaussian_blur(image, [side, side], [drawn.sigma.item()])
        if drawn.noise:
            # Not torchvision's gaussian_noise: it draws from the global generator.
            generator = torch.Generator().manual_seed(drawn.noise_seed)
            noise = torch.randn(image.shape, generator=generator).mul_(255 * self.noise_std)
            image = noise.add_(image).round_().clamp_(0, 255).to(torch.uint8)
        return image, mask


def _rotate_and_zoom(
    image: Tensor, drawn: Draws, interpolation: InterpolationMode, fill: list[int]
) -> Tensor:
    height, width = image.shape[-2:]
    moves = {
        "angle": drawn.angle.item(),
        "translate": [drawn.shift_x.item() * width, drawn.shift_y.item() * height],
        "scale": drawn.zoom.item(),
        "shear": [0.0, 0.0],
    }
    result: Tensor = F.affine(image, **moves, interpolation=interpolation, fill=fill)
    return result
