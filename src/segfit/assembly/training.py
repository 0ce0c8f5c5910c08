"""Config → a training that is ready to run."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly import data, earlier
from segfit.assembly.earlier import Notice, Samples
from segfit.assembly.state import make_device, make_state
from segfit.assembly.task import TRAINED, assembly_of
from segfit.assembly.tuned import model_label, stale
from segfit.config.check import flat, plain
from segfit.config.tasks import monitor_mode, schema_of
from segfit.data.source import Source
from segfit.engine.checkpoint import Checkpoints
from segfit.engine.distributed import SINGLE_PROCESS, Distributed, refuse_differences
from segfit.engine.events import EndLog
from segfit.engine.fit import Fit
from segfit.engine.state import TrainingState, derive_seed, seed_everything
from segfit.engine.task import FitOptions
from segfit.runs.files import RunFolder
from segfit.system.cards import GIB, share_of_card
from segfit.system.hardware import device_name, peak_memory_gib

# Options by which runs are compared in TensorBoard's HPARAMS tab and in MLflow, as far as a run has them.
_COMPARED = (
    "model.name", "model.variant", "model.encoder", "model.base_channels", "model.num_blocks", "hardware.name", "batch_size",
    "accumulate", "epochs", "lr", "optimizer.name", "scheduler.name", "loss.name", "augmentation.name", "degrade.name",
    "image_size", "patch_size", "data.lookback", "data.horizon", "seed",
)  # fmt: skip


@dataclass
class Training:
    """A training that is ready to run."""

    fit: Fit  # the loop with all it needs
    facts: dict[str, str]  # label → text of what really runs
    hparams: dict[str, Any]  # what runs are compared by
    statistics: dict[str, Any]  # what the task took from the training data
    unit: str  # what a sample is called
    columns: Mapping[str, str]  # score name → label, for the scores that are shown
    samples: Samples  # what the run was trained on, and what it holds out


def make_training(
    config: DictConfig,
    run: Path,
    notice: Notice,
    progress: Callable[..., None] | None = None,
    distributed: Distributed = SINGLE_PROCESS,
    resumed: bool = False,
) -> Training:
    """Return everything that a checked `config` says, ready to run; every process of `distributed` has to call.

    `run` is the run's folder; if `resumed`, its last checkpoint is loaded. `notice` is called with a line for each fallback
    or oddity, `progress` with (done, total) files while the data set is checked, and with (done, total, what="decoding
    images") while `data.cache` is filled. Raises a SegFitError with every problem of the extra metrics or of the data set,
    or what else cannot be built.
    """
    refuse_differences(distributed, flat(plain(config)))
    assembly, schema = assembly_of(config), schema_of(config.task.name)
    start = earlier.read_start(config.init) if config.init is not None and not resumed else None
    if not resumed:
        assembly.settle(config, start.config if start else {}, notice)
    extra = assembly.make_extra_metrics(config)
    mode = monitor_mode(config, extra)
    before = earlier.read_samples(RunFolder(run).samples) if resumed else {}
    sources = earlier.kept_splits(config, assembly.make_sources(config), before)
    checking = partial(assembly.check_sources, config, sources, TRAINED, progress)
    report = distributed.once_a_machine(checking)
    samples = earlier.samples_of(sources)
    differing = earlier.differences(before, samples)
    if start is not None:  # what its run was trained on is not held out here
        held_out_now = {part: names for part, names in samples.items() if part != "train"}
        differing += earlier.differences({"train": start.samples.get("train", {})}, held_out_now)
    for line in (*report.notices, *(differing if distributed.is_main else ())):
        notice(line)
    if "train" in samples:
        samples["train"] = {**before.get("train", {}), **samples["train"]}

    seed_everything(config.seed, config.deterministic)
    device, precision = make_device(config, config.device, notice)
    refuse_differences(distributed, {"device": device.type, "precision": precision.name})
    outdated = stale(config, device)
    workers = data.workers_of(config, device, cached=True)
    decoding = partial(progress, what="decoding images") if progress is not None else None
    caching = partial(data.cached_sources, config, sources, decoding)
    cached, kept = caching() if config.data.cache == "none" else distributed.once_a_machine(caching)
    for line in filter(None, (outdated, kept)):
        notice(line)
    weights = assembly.sample_weights(config, sources["train"])
    train = data.make_train_batches(
        config, cached["train"], device, workers, notice, distributed, weights
    )
    scored = len(sources["val"])
    if config.limit_val_batches is not None:  # counted as if one process saw them all
        scored = min(scored, config.limit_val_batches * assembly.held_out_batch_size(config))
    own, shared = range(distributed.rank, scored, distributed.size), distributed.size > 1
    dataset = assembly.make_held_out_dataset(config, cached["val"])
    held_out = data.batches_in_order(config, dataset, device, workers, notice, own, share=shared)
    updates = -(-train.batches_per_epoch() // config.accumulate)
    state, initial = make_state(
        config, device, precision, updates, notice, resumed, start, distributed
    )
    facts = _facts(config, sources, state, initial, train.sampler.size, workers)
    if not distributed.is_main:  # dropout is to differ; the weights are equal by now
        seed_everything(derive_seed(config.seed, distributed.rank), config.deterministic)
    folder = RunFolder(run)
    checkpoints = Checkpoints(folder.checkpoints, earlier.about(config, state))
    if resumed:
        earlier.resume(state, checkpoints, notice, updates)
    statistics = assembly.make_statistics(config, sources, report)
    count = min(config.report.panels, scored)  # held-out samples to be shown, spread evenly
    spread = [round(step * (scored - 1) / max(count - 1, 1)) for step in range(count)]
    panels = {index: sources["val"].id(index) for index in spread}
    task = assembly.make_task(
        config, device, statistics, panels=panels, distributed=distributed, extra=extra
    )
    given = plain(config) | plain(config.report) | plain(config.checkpoint) | {"monitor_mode": mode}
    options = FitOptions(**{field.name: given[field.name] for field in fields(FitOptions)})
    count, bad = len(held_out), folder.bad_batches
    fit = Fit(state, task, train, lambda: held_out, count, checkpoints, options, bad)
    columns = {**schema.COLUMNS, **{name: name for one in extra for name in one.names}}
    values = flat(given)
    compared = {key: values[key] for key in _COMPARED if key in values}
    return Training(fit, facts, compared, statistics, schema.UNIT, columns, samples)


def _facts(
    config: DictConfig,
    sources: Mapping[str, Source],
    state: TrainingState,
    weights: str,
    batch_size: int,
    workers: int,
) -> dict[str, str]:
    distributed = state.distributed
    millions, frozen = (
        f"{sum(parameter.numel() for parameter in some) / 1e6:.1f} M parameters"
        for some in (state.model.parameters(), state.frozen)
    )
    lasting = f", the first {config.freeze_epochs} epochs" if config.freeze_epochs else ""
    variant = config.model.get("variant") or config.model.get("encoder") or ""
    sizes = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    factors = [str(batch_size)]
    if config.accumulate > 1:
        factors.append(f"{config.accumulate} accumulated")
    if distributed.size > 1:
        factors.append(f"{distributed.size} processes")
    batch, effective = " × ".join(factors), batch_size * config.accumulate * distributed.size
    return {
        "device": device_name(state.device),
        "recipe": " · ".join(filter(None, (config.hardware.name, config.hardware.note))),
        **_card(config, state, batch_size),
        "precision": state.precision.name,
        "model": f"{f'{config.model.name} {variant}'.strip()} ({millions})",
        "weights": weights,
        **({"frozen": frozen + lasting} if state.frozen else {}),
        "data": f"{config.data.name}: {sizes}",
        "batch": f"{batch} = {effective}" if len(factors) > 1 else batch,
        "sample": schema_of(config.task.name).sample_label(config),
        **assembly_of(config).facts(config, sources),
        "workers": str(workers),
        "compiled": "no" if distributed.unwrap(state.forward) is state.model else "yes",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} cores",
    }


def _card(config: DictConfig, state: TrainingState, batch_size: int) -> dict[str, str]:
    """Return what share of a card is used, as far as the table of plans knows."""
    if state.device.type != "cuda":
        return {}
    numbers = assembly_of(config).example_input(config, 1, torch.device("cpu")).numel()
    model = model_label(config) if state.precision.name != "fp32" else ""
    gib = torch.cuda.get_device_properties(state.device).total_memory / GIB
    memory = share_of_card(config.task.name, model, numbers, batch_size, config.accumulate, gib)
    return {"memory": memory} if memory else {}


def metrics_of(training: Training, end: EndLog, config: DictConfig) -> dict[str, Any]:
    """Return what metrics.json holds: scores, speed, memory, and what really ran."""
    fit = training.fit
    return {
        "status": end.reason,
        "monitor": config.monitor,
        "monitor_mode": fit.options.monitor_mode,
        "columns": training.columns,
        "unit": training.unit,
        "best": end.best_scores,
        "best_epoch": end.best_epoch,
        "last": fit.result.scores if fit.result is not None else {},
        "updates": end.updates,
        "samples_per_second": fit.log.total_samples / max(fit.log.total_seconds, 1e-9),
        "peak_memory_gib": peak_memory_gib(fit.state.device),
        "seconds": end.seconds,
        "precision": fit.state.precision.name,
        **training.statistics,
        "facts": training.facts,
    }
