"""Config → loss, augmentation on the device and predictor: what a batch means."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from segfit import runs
from segfit.check import plain, size_of
from segfit.build.augmentation import make_cpu_augment, make_gpu_augment, make_mix
from segfit.build.data import held_out_batch_size, make_classes, make_held_out_batches, make_sources, make_train_batches, workers_of
from segfit.data.batches import HeldOutBatches, TrainBatches
from segfit.data.cores import choose_workers
from segfit.data.dataset import EvalDataset, TrainDataset
from segfit.data.loader import eval_loader, train_loader
from segfit.data.prefetch import DevicePrefetcher
from segfit.data.preflight import PreflightReport, check_sources, count_class_pixels
from segfit.data.sampler import EpochSampler
from segfit.data.source import Source
from segfit.engine.checkpoint import Checkpoints, load_checkpoint
from segfit.engine.compiling import compiled_or_eager
from segfit.engine.events import EndLog
from segfit.engine.fit import Fit, FitOptions
from segfit.engine.precision import Precision, resolve_precision, set_tf32
from segfit.engine.seeding import seed_everything
from segfit.engine.state import TrainingState
from segfit.errors import SegFitError
from segfit.hardware import device_name, keep_freed_memory, peak_memory_gib, resolve_device
from segfit.labels import Classes
from segfit.losses import SegmentationLoss, balanced_weights, segmentation_loss
from segfit.models.build import make_model
from segfit.optim import make_optimizer, make_scheduler
from segfit.tasks.inference import Predictor
from segfit.tasks.segmentation import SegmentationTask



def make_loss(config: DictConfig, class_weights: list[float] | None) -> SegmentationLoss:
    """Return the loss of a config with the class weights that were worked out for it."""
    options = plain(config.loss)
    for key in ("class_weights", "balance"):
        options.pop(key, None)
    return segmentation_loss(
        num_classes=config.data.num_classes, class_weights=class_weights, **options
    )


def class_weights_of(
    config: DictConfig, source: Source, preflight: PreflightReport
) -> list[float] | None:
    """Return the class weights of a config; "balanced" counts the training pixels."""
    wanted = config.loss.class_weights
    if wanted == "none":
        return None
    if wanted != "balanced":
        return [float(weight) for weight in wanted]
    pixels = preflight.class_pixels.get("train")
    if pixels is None:
        pixels = count_class_pixels(source, 200)
    return balanced_weights(torch.from_numpy(pixels), config.loss.balance)


def make_task(
    config: DictConfig,
    device: torch.device,
    *,
    class_weights: list[float] | None = None,
    panels: Mapping[int, str] | None = None,
    predictor: Predictor | None = None,
) -> SegmentationTask:
    """Return what a batch means under a config.

    Args:
        config: a run's.
        device: where batches lie.
        class_weights: of the loss.
        panels: index of a held-out sample → name, for those to show.
        predictor: how held-out images become logits; None: as data.fit says.
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
    )


def make_predictor(
    config: DictConfig, *, sliding: bool = False, overlap: float = 0.5, flip: bool = False
) -> Predictor:
    """Return how images become logits: whole, or in windows of image_size."""
    window = size_of(config.image_size) if sliding or config.data.fit == "crop" else None
    return Predictor(window, overlap, flip)


