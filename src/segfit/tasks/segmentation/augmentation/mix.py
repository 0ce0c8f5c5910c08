"""MixUp and CutMix: batches whose images are made of two, and targets to match."""

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.schema import AugmentationConfig


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
            return self._blend(images, masks, partner, share)
        share = random.betavariate(self.cutmix_alpha, self.cutmix_alpha)
        rows, columns = _box(random, masks.shape[1], masks.shape[2], 1 - share)
        images, masks = images.clone(), masks.clone()
        for batch in (images, masks):
            batch[..., rows, columns] = batch[..., rows, columns].roll(partner, 0)
        return images, masks

    def _blend(
        self, images: Tensor, masks: Tensor, partner: int, share: float
    ) -> tuple[Tensor, Tensor]:
        blended = torch.lerp(images.roll(partner, 0), images, share)
        classes = torch.arange(self.num_classes, device=masks.device).view(1, -1, 1, 1)
        own = (masks.unsqueeze(1) == classes).to(images.dtype)
        ignored = masks == IGNORE_INDEX
        ignored = (ignored | ignored.roll(partner, 0)).unsqueeze(1)
        return blended, torch.lerp(own.roll(partner, 0), own, share).masked_fill_(ignored, 0)


def _box(random: Random, height: int, width: int, area: float) -> tuple[slice, slice]:
    """Return rows and columns of a rectangle of this share of the area about a random centre.

    It is clipped at the border, as in the paper.
    """

    def span(size: int) -> slice:
        half = round(size * area**0.5 / 2)
        centre = random.randrange(size)
        return slice(max(centre - half, 0), min(centre + half, size))

    return span(height), span(width)
