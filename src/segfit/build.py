"""Where config becomes objects; nothing else between the entry points and the engine sees a config."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from segfit import runs
from segfit.check import size_of
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

_MIX = ("mixup", "mixup_alpha", "cutmix", "cutmix_alpha")


@dataclass
class Training:
    """A training that is ready to run.

    Args:
        fit: the loop with all it needs.
        facts: label → text of what really runs.
        classes: of the data.
        hparams: what sweeps are compared by, the same keys in every run.
        class_weights: of the loss, as they were worked out; None: all alike.
    """

    fit: Fit
    facts: dict[str, str]
    classes: Classes
    hparams: dict[str, str | float | bool]
    class_weights: list[float] | None


def plain(config: Any) -> Any:
    """Return a config as dicts, lists and values."""
    return OmegaConf.to_container(config, resolve=True)


# --------------------------------------------------------------------------------------- data


def make_classes(data: DictConfig) -> Classes:
    """Return the classes that a data config describes."""
    names = data.class_names or [f"class_{index}" for index in range(data.num_classes)]
    colors = tuple(tuple(color) for color in data.class_colors or [])
    return Classes(tuple(names), colors, data.background)


def make_sources(data: DictConfig) -> dict[str, Source]:
    """Return the splits of a data config: train, val and perhaps test.

    Raises:
        SegFitError: if the folder is not laid out as the config says.
    """
    classes = make_classes(data)
    if data.name == "shapes":
        from segfit.data.shapes import shapes_sources

        shapes = shapes_sources(
            data.train_size, data.val_size, data.test_size, data.resolution, data.data_seed
        )
        for source in shapes.values():
            source.classes = classes
        return dict(shapes)
    from segfit.data.folder import folder_sources
    from segfit.data.splits import SplitRule

    folders = folder_sources(
        data.root,
        classes=classes,
        images=data.images,
        masks=data.masks,
        mask_format=data.mask_format,
        ignore_index=data.ignore_index,
        label_map=plain(data.label_map) if data.label_map else None,
        image_mode=data.image_mode,
        window=tuple(data.window) if data.window is not None else None,
        split=SplitRule(**plain(data.split)),
    )
    return dict(folders)


def make_train_batches(
    config: DictConfig, source: Source, device: torch.device, workers: int
) -> TrainBatches:
    """Return the training batches of a config."""
    augment = None
    if config.augmentation.name == "cpu":
        from segfit.augmentation.cpu import CpuAugment

        augment = CpuAugment(**_augmentation_options(config))
    dataset = TrainDataset(source, size_of(config.image_size), config.data.fit, augment)
    sampler = EpochSampler(len(source), config.batch_size, config.seed)
    loader = train_loader(
        dataset,
        sampler,
        device=device,
        workers=workers,
        prefetch=config.loader.prefetch,
        pin_memory=config.loader.pin_memory,
        persistent=config.loader.persistent,
    )
    return TrainBatches(sampler, DevicePrefetcher(loader, device), config.limit_train_batches)


def make_held_out_batches(
    config: DictConfig, source: Source, device: torch.device, workers: int, limit: int | None
) -> HeldOutBatches:
    """Return a source's images in order, in batches of a config."""
    loader = eval_loader(
        EvalDataset(source, size_of(config.image_size), config.data.fit),
        held_out_batch_size(config),
        device=device,
        workers=workers,
        prefetch=config.loader.prefetch,
        pin_memory=config.loader.pin_memory,
        persistent=config.loader.persistent,
    )
    return HeldOutBatches(DevicePrefetcher(loader, device), len(loader), limit)


def held_out_batch_size(config: DictConfig) -> int:
    """Return the images of a validation batch: whole images of any size one by one for sliding windows."""
    return 1 if config.data.fit == "crop" else int(config.batch_size)


def workers_of(config: DictConfig, device: torch.device) -> int:
    """Return how many processes read images for a config on this machine."""
    height, width = size_of(config.image_size)
    return choose_workers(
        config.loader.workers,
        device_type=device.type,
        batch_bytes=config.batch_size * 4 * height * width,
        prefetch=config.loader.prefetch,
    )


def _augmentation_options(config: DictConfig) -> dict[str, Any]:
    options = {k: v for k, v in plain(config.augmentation).items() if k not in ("name", *_MIX)}
    return {**options, "fill": plain(config.data.mean)}


# --------------------------------------------------------------------------------------- task


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
    from segfit.augmentation.mix import Mix

    augment = None
    if config.augmentation.name == "kornia_gpu":
        from segfit.augmentation.kornia_gpu import KorniaGpu

        augment = KorniaGpu(**_augmentation_options(config))
    shares = {key: config.augmentation[key] for key in _MIX}
    mixes = config.augmentation.name != "none" and shares["mixup"] + shares["cutmix"] > 0
    return SegmentationTask(
        classes=make_classes(config.data),
        criterion=make_loss(config, class_weights).to(device),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augment=augment,
        mix=Mix(num_classes=config.data.num_classes, **shares) if mixes else None,
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


# ----------------------------------------------------------------------------------- training


def training(
    config: DictConfig,
    run: Path,
    notice: Notice,
    progress: Callable[[int, int], None] | None = None,
) -> Training:
    """Return everything that `config` says, ready to run; resumed where the run has a checkpoint.

    Args:
        config: checked.
        run: the run's folder.
        notice: told what fell back or is odd, a line each.
        progress: called with (done, total) files while the data set is checked.

    Raises:
        SegFitError: with every problem of the data set, or what else cannot be built.
    """
    sources = make_sources(config.data)
    report = check_sources(
        sources, check=config.data.check, needs={"train": 1, "val": 1}, progress=progress
    )
    for line in report.notices:
        notice(line)

    seed_everything(config.seed, config.deterministic)
    device, precision = make_device(config.device, config.precision, notice)
    workers = workers_of(config, device)
    train = make_train_batches(config, sources["train"], device, workers)
    held_out = make_held_out_batches(
        config, sources["val"], device, workers, config.limit_val_batches
    )
    updates = -(-train.batches_per_epoch() // config.accumulate)
    state, weights = _make_state(config, device, precision, updates, notice)
    checkpoints = Checkpoints(runs.checkpoints(run))
    if config.resume is not None:
        _resume(state, checkpoints, notice)
    class_weights = class_weights_of(config, sources["train"], report)
    task = make_task(
        config,
        device,
        class_weights=class_weights,
        panels=_panels(config, sources["val"], len(held_out)),
    )
    fit = Fit(state, task, train, lambda: held_out, len(held_out), checkpoints, _options(config))
    facts = _facts(config, sources, state, weights, workers)
    hparams = _hparams(config, precision)
    return Training(fit, facts, make_classes(config.data), hparams, class_weights)


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


def _make_state(
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


def _resume(state: TrainingState, checkpoints: Checkpoints, notice: Notice) -> None:
    if not checkpoints.last.exists():
        notice(f"{checkpoints.last}: nothing was saved yet; starting from the beginning.")
        return
    try:
        state.load_state_dict(load_checkpoint(checkpoints.last))
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise SegFitError(
            f"{checkpoints.last} does not fit the run's config.yaml ({str(error).splitlines()[0]}). "
            f"Was one of the two replaced?"
        ) from error


def _panels(config: DictConfig, source: Source, batches: int) -> dict[int, str]:
    """Return as many held-out images as are to be shown, spread evenly."""
    shown = min(len(source), batches * held_out_batch_size(config))
    count = min(config.report.panels, shown)
    spread = [round(step * (shown - 1) / max(count - 1, 1)) for step in range(count)]
    return {index: source.id(index) for index in spread}


def _options(config: DictConfig) -> FitOptions:
    names = set(FitOptions.__dataclass_fields__)
    values = {**plain(config), **plain(config.checkpoint), **plain(config.report)}
    return FitOptions(**{name: value for name, value in values.items() if name in names})


def _facts(
    config: DictConfig,
    sources: Mapping[str, Source],
    state: TrainingState,
    weights: str,
    workers: int,
) -> dict[str, str]:
    height, width = size_of(config.image_size)
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    variant = config.model.get("variant") or config.model.get("encoder") or ""
    sizes = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    micro, accumulate = config.batch_size, config.accumulate
    batch = f"{micro} × {accumulate} accumulated = {micro * accumulate}"
    return {
        "device": device_name(state.device),
        "recipe": config.hardware.name,
        "precision": state.precision.name,
        "model": f"{config.model.name} {variant} ({parameters / 1e6:.1f} M parameters)".replace(
            "  ", " "
        ),
        "weights": weights,
        "data": f"{config.data.name}: {sizes} images, {config.data.num_classes} classes",
        "image size": f"{width} × {height} ({config.data.fit})",
        "batch": batch if accumulate > 1 else str(micro),
        "augmentation": config.augmentation.name,
        "workers": str(workers),
        "compiled": "yes" if state.forward is not state.model else "no",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }


def _hparams(config: DictConfig, precision: Precision) -> dict[str, str | float | bool]:
    height, width = size_of(config.image_size)
    return {
        "model": config.model.get("variant") or config.model.get("encoder") or config.model.name,
        "hardware": config.hardware.name,
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "image_size": f"{height}x{width}",
        "epochs": config.epochs,
        "lr": config.lr,
        "optimizer": config.optimizer.name,
        "scheduler": config.scheduler.name,
        "loss": config.loss.name,
        "augmentation": config.augmentation.name,
        "precision": precision.name,
        "seed": config.seed,
    }


def metrics_of(training: Training, end: EndLog, config: DictConfig) -> dict[str, Any]:
    """Return what metrics.json holds: scores, speed, memory, and what really ran."""
    fit = training.fit
    return {
        "status": end.reason,
        "monitor": config.monitor,
        "best": end.best_scores,
        "best_epoch": end.best_epoch,
        "last": fit.result.scores if fit.result is not None else {},
        "updates": end.updates,
        "images_per_second": fit.total_images / max(fit.total_seconds, 1e-9),
        "peak_memory_gib": peak_memory_gib(fit.state.device),
        "seconds": end.seconds,
        "precision": fit.state.precision.name,
        "class_weights": training.class_weights,
        "facts": training.facts,
    }
