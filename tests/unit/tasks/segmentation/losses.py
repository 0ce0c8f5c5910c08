"""Losses, and what they are given, for tests."""

import torch
from torch import Tensor

from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.losses import SegmentationLoss
from segfit.tasks.segmentation.schema import LossConfig

NAMES = ("ce", "dice", "dice_ce", "focal", "tversky", "lovasz", "lovasz_ce")
CLASSES = 4
WEIGHTS = (0.5, 1.0, 2.0, 1.5)


def make(name: str, **options: object) -> SegmentationLoss:
    weights = options.pop("class_weights", None)
    return SegmentationLoss(LossConfig(name, **options), CLASSES, weights)  # type: ignore[arg-type]


def value(loss: SegmentationLoss, logits: Tensor, targets: Tensor) -> Tensor:
    return loss(logits, targets, loss.totals(targets))


def batch(images: int = 6, side: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and hard targets: some pixels ignored, one image wholly, one class in few images."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, CLASSES, side, side + 2, generator=generator)
    targets = torch.randint(0, CLASSES - 1, (images, side, side + 2), generator=generator)
    targets[0, :2] = CLASSES - 1
    targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORE_INDEX
    targets[2] = IGNORE_INDEX
    return logits, targets


def one_hot(targets: Tensor) -> Tensor:
    return (targets.unsqueeze(1) == torch.arange(CLASSES).view(1, -1, 1, 1)).float()


def soft(targets: Tensor, seed: int = 1) -> Tensor:
    """Random shares of classes, 0 where ignored."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(len(targets), CLASSES, *targets.shape[1:], generator=generator) ** 3
    return shares / shares.sum(1, keepdim=True) * (targets != IGNORE_INDEX).unsqueeze(1)
