"""benchmark=diagnose: where the time of a training goes, what holds it up, and the one change that helps most."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.task import planning_of
from segfit.assembly.training import make_training
from segfit.engine.findings import Findings
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.precision import native_precisions
from segfit.errors import SegFitError
from segfit.report.lines import LineReport
from segfit.report.session import RunReport
from segfit.system.cores import available_cores
from segfit.system.hardware import resolve_device
from segfit.system.monitor import Means, Monitor, summed_up
from segfit.tuning.bench import Bench
from segfit.tuning.change import Change, augmentation_of, changed
from segfit.tuning.diagnosis import Diagnosis
from segfit.tuning.facts import Costs, Facts, Resident
from segfit.tuning.measure import measure_training
from segfit.tuning.samples import SlowSource, measure_costs
from segfit.tuning.timeline import Timeline, record
from segfit.tuning.verdict import WORTH, verdict

SECONDS = 20.0
_ENDLESS = 1_000_000  # epochs
_DOUBLINGS = 3  # of the batch
_PROBE_SHARE = 0.2  # of `seconds`, for each trial of another setting
_RAM_SHARE = 0.5  # of the free memory that decoded images may take


def run(config: DictConfig, bench: Bench) -> Findings:
    """Record the training, try what might be faster, and say what is; apply=true trains again with it."""
    seconds = config.seconds or SECONDS
    total = len(list(settings(config))) + 3 + config.benchmark.apply
    names: list[str] = []

    def measuring(what: str) -> None:
        bench.progress(what, min(len(names), total - 1), total)
        names.append(what)

    measuring("the training as it is")
    now = recorded(config, bench, bench.folder / "run", seconds)
    measuring("its arithmetic alone")
    arithmetic = resident(config, {}, seconds)
    if arithmetic is None:
        raise SegFitError(
            f"batch_size={config.batch_size} does not fit into memory: set batch_size lower and accumulate higher. "
            f"benchmark=max_batch finds the largest that fits."
        )
    tried = try_settings(config, bench, seconds, arithmetic, now.samples, measuring)
    facts = facts_of(now, arithmetic, tried)
    found = verdict(facts)
    applied = None
    if config.benchmark.apply and found.best is not None:
        measuring(f"the training with {found.best.change.typed}")
        with_change = changed(config, found.best.change.options)
        applied = recorded(with_change, bench, bench.folder / "changed", seconds).timeline
    return Diagnosis(facts, now.timeline, now.means, found, applied, overrides()).findings()


@dataclass(frozen=True)
class Recorded:
    """What was recorded of a training. It keeps none of its tensors: what is tried next needs the memory.

    Args:
        config: of it.
        timeline: where its time went.
        means: what the monitor saw meanwhile.
        costs: of a sample.
        copied: seconds to copy one.
        samples: of the data set.
        workers: that read them.
        cuda: whether the device is a CUDA card.
    """

    config: DictConfig
    timeline: Timeline
    means: Means
    costs: Costs
    copied: float
    samples: int
    workers: int
    cuda: bool


def recorded(config: DictConfig, bench: Bench, folder: Path, seconds: float) -> Recorded:
    """Train as train.py does, TensorBoard and checkpoints in `folder` included, for some seconds."""
    config = changed(
        config, {"epochs": _ENDLESS, "max_steps": None, "patience": None, "resume": None}
    )
    training = make_training(config, folder, bench.notice)
    loader = training.fit.train.batches.loader  # type: ignore[attr-defined]
    dataset = loader.samples
    if config.benchmark.slow_disk_ms and config.data.cache == "none":
        dataset.source = SlowSource(dataset.source, config.benchmark.slow_disk_ms / 1000)
    costs, copied = measure_costs(dataset)
    silent = LineReport(lambda _: None)
    report = RunReport(folder, silent, [])
    if config.report.tensorboard:
        report.add_tensorboard(OmegaConf.to_yaml(config), training.hparams, resume_step=None)
    with Monitor(min(1.0, seconds / 10)) as monitor:
        timeline = record(
            training.fit,
            report.listener,
            batch_size=config.batch_size,
            seconds=seconds,
            warmup=config.benchmark.warmup,
        )
    return Recorded(
        config,
        timeline,
        summed_up(monitor.samples),
        costs,
        copied,
        samples=len(dataset),
        workers=loader.num_workers,
        cuda=training.fit.state.device.type == "cuda",
    )


def resident(config: DictConfig, options: Mapping[str, Any], seconds: float) -> float | None:
    """Return the median seconds of an update whose batch lies on the device, with changed options; None: it does not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    alone = changed(config, {**options, "loader.workers": 0, "data.check": "off", "resume": None})
    try:
        speed = measure_training(alone, seconds=_PROBE_SHARE * seconds, warmup=2, resident=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return float(speed["speed"]["ms_median"]) / 1000


def facts_of(now: Recorded, arithmetic: float, tried: list[Resident]) -> Facts:
    """Return the facts from which the verdict is made."""
    config, timeline, costs = now.config, now.timeline, now.costs
    per_update = {name: value / timeline.updates for name, value in timeline.phases.items()}
    restart = timeline.restarts / timeline.updates if now.workers else 0.0
    fitted = config.data.get("fit") != "crop"  # the cache holds samples of that size already
    cached = Costs(decode=now.copied, fit=0.0 if fitted else costs.fit, augment=costs.augment)
    return Facts(
        cuda=now.cuda,
        samples=round(timeline.samples),
        update=timeline.update,
        phases=per_update,
        resident=arithmetic,
        costs=costs,
        workers=now.workers,
        cores=available_cores(),
        threads=torch.get_num_threads(),
        restart=restart,
        refill=min(restart, timeline.epochs * config.batch_size * costs.total / timeline.updates),
        cached=cached if config.data.cache == "none" else None,
        pin_memory=config.loader.pin_memory,
        non_blocking=config.loader.non_blocking,
        persistent=config.loader.persistent,
        log_every=config.report.log_every,
        cache=_where_cached(now),
        tried=tried,
    )


def settings(config: DictConfig) -> Iterator[Change]:
    """Yield changes of the arithmetic that may be faster, except for the batch; each named by what it removes."""
    device, _ = resolve_device(config.device)
    native = native_precisions(device)
    if augmentation_of(config) == "cpu":
        yield Change("CPU augmentation", {"augmentation": "kornia-gpu"})
    if "fast" in config.model and not config.model.fast:
        yield Change("the stock model", {"model.fast": True})
    if config.precision.name == "fp32" and native[0] != "fp32":
        yield Change("full precision", {"precision": native[0]})
    if not config.channels_last:
        yield Change("channels before pixels", {"channels_last": True})
    if device.type == "cuda" and not config.compile:
        yield Change("many small kernels", {"compile": True})


def try_settings(
    config: DictConfig,
    bench: Bench,
    seconds: float,
    arithmetic: float,
    length: int,
    measuring: Callable[[str], None],
) -> list[Resident]:
    """Measure every setting's arithmetic; a batch is doubled as long as that pays.

    Args:
        config: of the training.
        bench: its notices name what does not fit.
        seconds: of the whole recording.
        arithmetic: seconds an update of the config itself.
        length: samples of the data set.
        measuring: called with what is measured next.
    """
    tried: list[Resident] = []

    def measure(change: Change) -> Resident | None:
        measuring(f"the arithmetic with {change.typed}")
        taken = resident(config, change.options, seconds)
        if taken is None:
            bench.notice(f"{change.typed}: does not fit into memory.")
            return None
        new = changed(config, change.options)
        tried.append(Resident(change, taken, new.batch_size * new.accumulate))
        return tried[-1]

    for change in settings(config):
        measure(change)
    pace = arithmetic / (config.batch_size * config.accumulate)  # seconds a sample
    for change in larger_batches(config, length):
        measured = measure(change)
        if measured is None or pace < WORTH * measured.seconds / measured.samples:
            break
        pace = measured.seconds / measured.samples
    return tried


def larger_batches(config: DictConfig, length: int) -> Iterator[Change]:
    """Yield a batch of 2, 4, 8 times the size, with less accumulation in return if there is some.

    Args:
        config: of the training.
        length: samples of the data set; no batch is larger.
    """
    batch, accumulate = config.batch_size, config.accumulate
    for _ in range(_DOUBLINGS):
        if 2 * batch > length:
            return
        batch, options, remark = 2 * batch, {"batch_size": 2 * batch}, ""
        if accumulate % 2 == 0:
            accumulate //= 2
            options["accumulate"] = accumulate
        else:
            remark = "the effective batch grows: lr may have to follow"
        yield Change("too small a batch", options, remark)


def overrides() -> list[str]:
    """Return what was typed to compose the training; nothing outside of benchmark.py."""
    if not HydraConfig.initialized():
        return []
    mine = ("benchmark=", "benchmark.", "seconds=")
    return [text for text in HydraConfig.get().overrides.task if not text.startswith(mine)]


def _where_cached(now: Recorded) -> str:
    """Return "ram" where decoded images leave half of the free memory, else "disk"."""
    needed = planning_of(now.config).sample_bytes(now.config) * now.samples
    return "ram" if needed < _RAM_SHARE * psutil.virtual_memory().available else "disk"
