"""Config → a training that is ready to run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly.data import (
    cached_sources,
    check_data,
    held_out_images,
    make_classes,
    make_held_out_batches,
    make_sources,
    make_train_batches,
    workers_of,
)
from segfit.assembly.resuming import about, flat, resume
from segfit.assembly.state import Notice, make_device, make_state
from segfit.assembly.task import class_weights_of, make_task
from segfit.assembly.tuned import stale
from segfit.config.check import plain, size_of
from segfit.data.source import Source
from segfit.engine.agreement import refuse_differences
from segfit.engine.checkpoint import Checkpoints
from segfit.engine.distributed import ALONE, World
from segfit.engine.events import EndLog
from segfit.engine.fit import Fit, FitOptions
from segfit.engine.precision import Precision
from segfit.engine.seeding import derive_seed, seed_everything
from segfit.engine.state import TrainingState
from segfit.runs import folder as runs
from segfit.system.hardware import device_name, peak_memory_gib
from segfit.tasks.segmentation.classes import Classes


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


def make_training(
    config: DictConfig,
    run: Path,
    notice: Notice,
    progress: Callable[..., None] | None = None,
    world: World = ALONE,
) -> Training:
    """Return everything that `config` says, ready to run; resumed where the run has a checkpoint.

    Args:
        config: checked.
        run: the run's folder.
        notice: told what fell back or is odd, a line each.
        progress: called with (done, total) files while the data set is checked, and with (done, total,
            what="decoding images") while `data.cache` is filled.
        world: the processes that train together; every one of them has to call.

    Raises:
        SegFitError: with every problem of the data set, or what else cannot be built.
    """
    refuse_differences(world, flat(plain(config)))
    sources = make_sources(config.data)
    report = world.once_a_machine(partial(check_data, config, sources, progress))
    for line in report.notices:
        notice(line)

    seed_everything(config.seed, config.deterministic)
    device, precision = make_device(config.device, config.precision, notice)
    refuse_differences(world, {"device": device.type, "precision": precision.name})
    outdated = stale(config, device)
    if outdated is not None:
        notice(outdated)
    workers = workers_of(config, device, cached=True)
    decoding = partial(progress, what="decoding images") if progress is not None else None
    caching = partial(cached_sources, config, sources, decoding)
    cached, kept = caching() if config.data.cache == "none" else world.once_a_machine(caching)
    if kept is not None:
        notice(kept)
    train = make_train_batches(config, cached["train"], device, workers, notice, world)
    held_out = make_held_out_batches(
        config, cached["val"], device, workers, config.limit_val_batches, notice, world
    )
    updates = -(-train.batches_per_epoch() // config.accumulate)
    state, weights = make_state(config, device, precision, updates, notice)
    facts = _facts(config, sources, state, weights, workers, world)
    state.world, state.forward = world, world.wrap(state.model, state.forward)
    if not world.is_main:  # dropout is to differ; the weights are equal by now
        seed_everything(derive_seed(config.seed, world.rank), config.deterministic)
    checkpoints = Checkpoints(runs.checkpoints(run), about(config, state))
    if config.resume is not None:
        resume(state, checkpoints, notice)
    class_weights = class_weights_of(config, sources["train"], report)
    task = make_task(
        config,
        device,
        class_weights=class_weights,
        panels=_panels(config, sources["val"]),
        world=world,
    )
    fit = Fit(state, task, train, lambda: held_out, len(held_out), checkpoints, _options(config))
    hparams = {**_hparams(config, precision), "processes": world.size}
    return Training(fit, facts, make_classes(config.data), hparams, class_weights)


def _panels(config: DictConfig, source: Source) -> dict[int, str]:
    """Return as many held-out images as are to be shown, spread evenly."""
    shown = held_out_images(config, source, config.limit_val_batches)
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
    world: World,
) -> dict[str, str]:
    height, width = size_of(config.image_size)
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    variant = config.model.get("variant") or config.model.get("encoder") or ""
    sizes = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    factors = [str(config.batch_size)]
    if config.accumulate > 1:
        factors.append(f"{config.accumulate} accumulated")
    if world.size > 1:
        factors.append(f"{world.size} processes")
    batch = " × ".join(factors)
    effective = config.batch_size * config.accumulate * world.size
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
        "batch": f"{batch} = {effective}" if len(factors) > 1 else batch,
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
        "samples_per_second": fit.teller.total_samples / max(fit.teller.total_seconds, 1e-9),
        "peak_memory_gib": peak_memory_gib(fit.state.device),
        "seconds": end.seconds,
        "precision": fit.state.precision.name,
        "class_weights": training.class_weights,
        "facts": training.facts,
    }
