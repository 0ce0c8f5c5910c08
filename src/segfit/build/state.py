"""Config → device, precision, model and optimizer."""

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

Notice = Callable[[str], None]


def make_device(
    requested: str, precision: DictConfig, notice: Notice
) -> tuple[torch.device, Precision]:
    """Return the device and the precision that really run; what fell back is told."""
    device, fallback = resolve_device(requested)
    if fallback:
        notice(fallback)
    chosen, fallback = resolve_precision(precision.name, device)
    if fallback:
        notice(fallback)
    if device.type == "cuda":
        set_tf32(precision.tf32)
    else:
        keep_freed_memory()
    return device, chosen


def make_state(
    config: DictConfig,
    device: torch.device,
    precision: Precision,
    updates_per_epoch: int,
    notice: Notice,
) -> tuple[TrainingState, str]:
    if config.hardware.vram_gb is not None and device.type == "cpu":
        notice(f"hardware={config.hardware.name}: no CUDA card here; running on the CPU.")
    resuming = config.resume is not None
    options = plain(config.model)
    model, weights = make_model(make_classes(config.data), options, pretrained=not resuming)
    if weights.alarming and not resuming:
        notice(weights.message)
    model = to_device(model, device, config.channels_last)
    forward: Callable[..., Any] = model
    if config.compile:
        height, width = size_of(config.image_size)
        example = torch.zeros(config.batch_size, 3, height, width, device=device)
        forward, reason = compiled_or_eager(model, example, precision)
        if reason:
            notice(reason)
    ema = None
    if config.ema_decay is not None:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    optimizer = make_optimizer(model, lr=config.lr, **plain(config.optimizer))
    scheduler = make_scheduler(
        optimizer,
        updates_per_epoch=updates_per_epoch,
        epochs=config.epochs,
        **plain(config.scheduler),
    )
    scaler = precision.scaler(config.precision.init_scale, config.precision.growth_interval)
    state = TrainingState(model, forward, optimizer, scheduler, scaler, ema, precision, device)
    return state, "from the checkpoint" if resuming else weights.source


def to_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Return the model on the device, in the memory format that its input has."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=layout)


