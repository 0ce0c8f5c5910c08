"""Config → loss, augmentation on the device and predictor: what a batch means."""

from collections.abc import Mapping

import torch
from omegaconf import DictConfig

from segfit.assembly.augmentation import make_gpu_augment, make_mix
from segfit.assembly.data import make_classes
from segfit.config.check import plain, size_of
from segfit.engine.distributed import ALONE, World
from segfit.tasks.segmentation.data.dataset import LabelledSource
from segfit.tasks.segmentation.data.preflight import PreflightReport, count_class_pixels
from segfit.tasks.segmentation.inference import Predictor
from segfit.tasks.segmentation.losses import SegmentationLoss, balanced_weights, segmentation_loss
from segfit.tasks.segmentation.task import SegmentationTask


def make_loss(config: DictConfig, class_weights: list[float] | None) -> SegmentationLoss:
    """Return the loss of a config with the class weights that were worked out for it."""
    options = plain(config.loss)
    for key in ("class_weights", "balance"):
        options.pop(key, None)
    return segmentation_loss(
        num_classes=config.data.num_classes, class_weights=class_weights, **options
    )


def class_weights_of(
    config: DictConfig, source: LabelledSource, preflight: PreflightReport
) -> list[float] | None:
    """Return the class weights of a config; "balanced" counts the training pixels."""
    wanted = config.loss.class_weights
    if wanted == "none":
        return None
    if wanted != "balanced":
        return [float(weight) for weight in wanted]
    pixels = preflight.class_pixels.get("train")
    if pixels is None:
        pixels = count_class_pixels(source, 200, skip=config.data.on_bad_sample == "skip")
    return balanced_weights(torch.from_numpy(pixels), config.loss.balance)


def make_task(
    config: DictConfig,
    device: torch.device,
    *,
    class_weights: list[float] | None = None,
    panels: Mapping[int, str] | None = None,
    predictor: Predictor | None = None,
    world: World = ALONE,
) -> SegmentationTask:
    """Return what a batch means under a config.

    Args:
        config: a run's.
        device: where batches lie.
        class_weights: of the loss.
        panels: index of a held-out sample → name, for those to show.
        predictor: how held-out images become logits; None: as data.fit says.
        world: whose processes share the held-out images.
    """
    return SegmentationTask(
        classes=make_classes(config.data),
        criterion=make_loss(config, class_weights).to(device),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augment=make_gpu_augment(config),
        mix=make_mix(config),
        predictor=predictor or make_predictor(config),
        channels_last=config.channels_last,
        panels=panels or {},
        world=world,
    )


def make_predictor(
    config: DictConfig, *, sliding: bool = False, overlap: float = 0.5, flip: bool = False
) -> Predictor:
    """Return how images become logits: whole, or in windows of image_size."""
    window = size_of(config.image_size) if sliding or config.data.fit == "crop" else None
    return Predictor(window, overlap, flip)
