"""Augmentation of whole batches on the device, each operation only on the images that it is drawn for.

That is drawn on the host, which so knows how many images each operation gets and never asks the device. Flips, rotation and
zoom are one warp. Kornia filters; its `augmentation` classes draw from the global generator, warp once an operation, and
read from the device to check values.
"""

import torch
from kornia.filters import filter2d_separable
from torch import Tensor
from torch.nn import functional as F

from segfit.tasks.segmentation.augmentation import AugmentationOptions, draw
from segfit.tasks.segmentation.classes import IGNORE_INDEX


class KorniaGpu(AugmentationOptions):
    """Augments a batch and its masks; options and their meaning: `AugmentationOptions`."""

    @torch.no_grad()
    def __call__(self, images: Tensor, masks: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Return augmented images and masks on their device; the arguments stay as they are.

        The same seed gives the same result on every device up to rounding, except for the noise, which the
        device's own generator makes: the host would be too slow.

        Images are `(B, C, H, W)` float32 in [0, 1], RGB or bands, which have no saturation and no hue; masks `(B, H, W)` int64
        class indices and `IGNORE_INDEX`. What came from outside the frame is `fill` and `IGNORE_INDEX`. An image that no
        operation is drawn for is the same to the last bit.
        """
        drawn = draw(self, len(images), seed)
        images, masks = images.clone(), masks.clone()
        chosen = _chosen(drawn, images.device)
        if "color_jitter" in chosen:
            index, factors = chosen["color_jitter"]
            *linear, hue = factors.unbind(1)
            recolored = jitter(images[index], *linear)
            # The slowest operation, and grey data sets switch it off.
            recolored = shift_hue(recolored, hue) if self.hue and len(self.fill) == 3 else recolored
            images.index_copy_(0, index, recolored)
        for name, dim in (("hflip", -1), ("vflip", -2)):
            if name in chosen:
                index, _ = chosen[name]
                for batch in (images, masks):
                    batch.index_copy_(0, index, batch[index].flip(dim))
        if self.swap and "mirror" in chosen:
            index, _ = chosen["mirror"]
            masks.index_copy_(0, index, self.mirrored(masks[index]))
        if "affine" in chosen:
            index, moves = chosen["affine"]
            matrices, shifts = moves[:, :4].view(-1, 2, 2), moves[:, 4:]
            # One scalar a kernel: a tensor made from the list would be a blocking copy to the device.
            fill = torch.cat([images.new_full((1, 1, 1, 1), value) for value in self.fill], 1)
            warped = warp(images[index], masks[index], matrices, shifts, fill)
            images.index_copy_(0, index, warped[0])
            masks.index_copy_(0, index, warped[1])
        if "blur" in chosen:
            index, sigma = chosen["blur"]
            radius = self.blur_radius(*masks.shape[1:])
            images.index_copy_(0, index, blur(images[index], sigma, radius))
        if "noise" in chosen:
            index, _ = chosen["noise"]
            generator = torch.Generator(images.device).manual_seed(int(drawn["noise_seed"]))
            noise = torch.empty_like(images[index]).normal_(0, self.noise_std, generator=generator)
            images.index_copy_(0, index, noise.add_(images[index]).clamp_(0, 1))
        return images, masks


def _chosen(drawn: dict[str, Tensor], device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Return operation → (index `(n,)` int64 of the images that get it, parameters `(n, k)` float32), by one copy to the device.

    Operations that no image gets are left out. Flips of images that are warped go into the warp.
    """
    angle, zoom = drawn["angle"].deg2rad(), drawn["zoom"]
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    # The source is read mirrored: that is a flip before the rotation.
    x, y = 1.0 - 2.0 * drawn["hflip"], 1.0 - 2.0 * drawn["vflip"]
    # Rows of the 2×2 matrices that lead from an output pixel back to its source, and the shift.
    moves = (x * cos, x * sin, -y * sin, y * cos, drawn["shift_x"], drawn["shift_y"])
    colors = (drawn[name] for name in ("brightness", "contrast", "saturation", "hue"))
    parameters: dict[str, tuple[Tensor, ...]] = {
        "hflip": (drawn["hflip"] & ~drawn["affine"],),
        "vflip": (drawn["vflip"] & ~drawn["affine"],),
        "mirror": (drawn["hflip"] ^ drawn["vflip"],),  # both make a turn
        "affine": (drawn["affine"], *moves),
        "color_jitter": (drawn["color_jitter"], *colors),
        "blur": (drawn["blur"], drawn["sigma"]),
        "noise": (drawn["noise"],),
    }
    numbers = torch.arange(len(drawn["hflip"]), dtype=torch.float32)
    tables = {
        name: torch.stack([numbers, *values], 1)[drawn_for]
        for name, (drawn_for, *values) in parameters.items()
        if drawn_for.any()
    }
    if not tables:
        return {}
    packed = torch.cat([table.flatten() for table in tables.values()])
    if device.type == "cuda":
        packed = packed.pin_memory()  # else the copy would block
    parts = packed.to(device, non_blocking=True).split([table.numel() for table in tables.values()])
    rows = [part.view_as(table) for table, part in zip(tables.values(), parts, strict=True)]
    return {name: (row[:, 0].long(), row[:, 1:]) for name, row in zip(tables, rows, strict=True)}


def warp(
    images: Tensor, masks: Tensor, matrices: Tensor, shifts: Tensor, fill: Tensor
) -> tuple[Tensor, Tensor]:
    """Return images `(B, 3, H, W)` float (bilinear) and masks `(B, H, W)` int64 (nearest), read through matrices, then shifted.

    `matrices` `(B, 2, 2)` lead from output (x, y) to source (x, y), in pixels from the centre; `shifts` `(B, 2)` are in widths
    and heights of the image. Outside of the frame are `fill` `(1, 3, 1, 1)` and `IGNORE_INDEX`.
    """
    height, width = masks.shape[1:]
    # Not affine_grid: its matrix product runs in TF32 where that is allowed, half a pixel off.
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device) - (height - 1) / 2
    x = x - width * shifts[:, 0].view(-1, 1, 1)
    y = y.view(-1, 1) - height * shifts[:, 1].view(-1, 1, 1)
    source = matrices.view(-1, 1, 1, 2, 2)
    grid_x = (source[..., 0, 0] * x + source[..., 0, 1] * y) * (2 / width)
    grid_y = (source[..., 1, 0] * x + source[..., 1, 1] * y) * (2 / height)
    grid = torch.stack((grid_x, grid_y), 3)
    warped = F.grid_sample(images - fill, grid, mode="bilinear", align_corners=False)
    # Shifted by one, so that the 0 that grid_sample pads with is no class.
    shifted = (masks + 1).to(images.dtype).unsqueeze(1)
    labels = F.grid_sample(shifted, grid, mode="nearest", align_corners=False).squeeze(1).long() - 1
    return warped.add_(fill).clamp_(0, 1), labels.masked_fill_(labels < 0, IGNORE_INDEX)


def jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Return images `(B, 3, H, W)` float in [0, 1] with changed colours, as torchvision's `adjust_*`, one after the other.

    Factors are `(B,)`: brightness 0 is black, contrast 0 the image's mean grey, saturation 0 grey.
    """
    images = (images * brightness.view(-1, 1, 1, 1)).clamp_(0, 1)
    mean = luma(images).mean((2, 3), keepdim=True)
    images = torch.lerp(mean, images, contrast.view(-1, 1, 1, 1)).clamp_(0, 1)
    return torch.lerp(luma(images), images, saturation.view(-1, 1, 1, 1)).clamp_(0, 1)


def luma(images: Tensor) -> Tensor:
    """Return the grey value `(B, 1, H, W)` of images `(B, 3, H, W)`; bands are grey each by itself."""
    if images.shape[1] != 3:
        return images
    red, green, blue = images.split(1, 1)  # ITU-R 601-2, as in torchvision
    return torch.add(red * 0.2989, green, alpha=0.587).add_(blue, alpha=0.114)


def shift_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Return images with the hue of HSV shifted; a third of the time of kornia's to HSV and back.

    Value and chroma (the largest channel, and what the smallest is below it) stay. Channels follow from the place on
    the colour circle as in https://en.wikipedia.org/wiki/HSL_and_HSV#HSV_to_RGB_alternative. Images are `(B, 3, H, W)`
    float in [0, 1], `turns` `(B,)` in turns of that circle.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(1)
    chroma = value - images.amin(1)
    divisor = chroma.masked_fill(chroma == 0, 1)  # grey has no hue: any will do
    sextant = torch.where(
        (red >= green) & (red >= blue),
        (green - blue) / divisor,
        torch.where(green >= blue, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    sextant += 6 * turns.view(-1, 1, 1)
    result = torch.empty_like(images)
    for channel, offset in enumerate((5, 3, 1)):
        distance = (sextant + offset).remainder_(6)
        missing = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        torch.addcmul(value, chroma, missing, value=-1, out=result[:, channel])
    return result


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Return images `(B, 3, H, W)` float under Gaussians of `sigma` `(B, 1)` pixels, reflected at the border.

    `radius` is the number of taps on either side, < H and < W.
    """
    # Not gaussian_blur2d: it reads sigma from the device to check that it is positive.
    taps = torch.arange(-radius, radius + 1, device=images.device)
    kernels = torch.softmax(-0.5 * (taps / sigma) ** 2, 1)
    images = images.contiguous()  # kornia below 0.9 needs it, later ones copy by themselves
    blurred: Tensor = filter2d_separable(images, kernels, kernels, border_type="reflect")
    return blurred.clamp_(0, 1)
