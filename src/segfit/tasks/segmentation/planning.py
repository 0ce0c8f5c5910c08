"""What benchmark.py asks of segmentation: the costliest config, example batches, the largest images."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.engine.task import Batch
from segfit.tasks.segmentation.assembly import make_augment
from segfit.tasks.segmentation.data.schema import channels_of
from segfit.tasks.segmentation.pictures import Panel, panels_image
from segfit.tasks.segmentation.schema import size_of
from segfit.tasks.segmentation.task import SegmentationTask

_PROBE = 128  # pixels a side: augmentation takes the same bytes a pixel of any image


def costliest(config: DictConfig) -> DictConfig:
    """Return a copy in which what may cost memory in some batches does so in all of them.

    Weights are random and classes are not counted: that takes the same memory, and no files.
    """
    config = config.copy()
    if "weights" in config.model:
        config.model.weights = None
    if config.loss.class_weights == "balanced":
        config.loss.class_weights = [1.0] * config.data.num_classes
    augmentation = config.augmentation
    for chance in ("hflip", "vflip", "affine", "color_jitter", "blur", "noise"):
        augmentation[chance] = 1.0 if augmentation[chance] > 0 else 0.0
    if augmentation.mixup + augmentation.cutmix > 0:
        augmentation.mixup, augmentation.cutmix = 1.0, 0.0  # soft targets, which either makes
    return config


def train_example(config: DictConfig) -> Batch:
    """Return a training micro-batch without content."""
    size = size_of(config.image_size)
    return {
        "image": torch.empty(config.batch_size, channels_of(config), *size, dtype=torch.uint8),
        "mask": torch.empty(config.batch_size, *size, dtype=torch.uint8),
        "index": torch.empty(config.batch_size, dtype=torch.int64),
    }


def held_out_example(
    config: DictConfig, count: int, original: tuple[int, ...]
) -> tuple[Batch, list[int]]:
    """Return a validation batch without content, and the numbers that evaluation reads from it for each image.

    `original` is the (height, width) of each of its `count` images before it was resized.
    """
    rows, columns = original
    height, width = original if config.data.fit == "crop" else size_of(config.image_size)
    batch = {
        "image": torch.empty(count, channels_of(config), height, width, dtype=torch.uint8),
        "mask": torch.empty(count, *original, dtype=torch.uint8),
        "content": torch.empty(count, 4, dtype=torch.int64),
        "shape": torch.empty(count, 2, dtype=torch.int64),
        "index": torch.empty(count, dtype=torch.int64),
    }
    return batch, [0, 0, height, width, rows, columns, 0]


def draw_batch(
    task: SegmentationTask, batch: Batch, seed: int, names: Sequence[str]
) -> NDArray[np.uint8]:
    """Return a picture (H, W, 3) of a training batch's first images beside their masks, as the network gets them."""
    images, targets = (part[: len(names)] for part in task.prepare(batch, seed))
    pixels = ((images * task.std + task.mean) * 255).round().clamp(0, 255).to(torch.uint8)
    # Of mixed images the larger share, and what is ignored.
    hard = targets.argmax(1).masked_fill(targets.sum(1) == 0, 255) if targets.ndim == 4 else targets
    masks = hard.to(torch.uint8).cpu().numpy()
    shown = zip(names, pixels.permute(0, 2, 3, 1).cpu().numpy(), masks, strict=True)
    panels = [Panel(name, image, mask, mask) for name, image, mask in shown]
    return panels_image(panels, task.classes, names, ("the network's image", "its mask"))


def without_augmentation(task: SegmentationTask) -> SegmentationTask:
    """Return a task that augments nothing on the device."""
    return replace(task, augment=None)


def device_augmentation(config: DictConfig) -> tuple[Callable[[], Any], float] | None:
    """Return a function that augments a few images on the device, and how many of them are as large as a sample.

    Every operation is applied to every image: the host draws which apply. None: nothing is augmented there.
    """
    augment = make_augment(costliest(config), "kornia-gpu")
    if augment is None:
        return None
    images = torch.rand(2, channels_of(config), _PROBE, _PROBE)
    masks = torch.zeros(2, _PROBE, _PROBE).long()
    share = math.prod(size_of(config.image_size)) / masks.numel()
    return (lambda: augment(images, masks, seed=0)), share
