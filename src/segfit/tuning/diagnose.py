"""benchmark=diagnose: where the time of a training goes, what holds it up, and the one change that helps most."""

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.training import make_training
from segfit.config.check import size_of
from segfit.engine.findings import Findings
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.precision import native_precisions
from segfit.errors import SegFitError
from segfit.report.lines import LineReport
from segfit.report.session import RunReport
from segfit.system.cores import available_cores
from segfit.system.hardware import resolve_device
from segfit.system.monitor import Means, Monitor, summed_up
from segfit.tasks.segmentation.data.dataset import TrainDataset
from segfit.tuning.bench import Bench
from segfit.tuning.diagnosis import Applied, Diagnosis
from segfit.tuning.facts import Costs, Facts, Trial
from segfit.tuning.measure import measure_training
from segfit.tuning.samples import SlowSource, measure_costs
from segfit.tuning.timeline import Timeline, record
from segfit.tuning.verdict import WORTH, Change, typed, verdict

SECONDS = 20.0
_ENDLESS = 1_000_000  # epochs
_DOUBLINGS = 3  # of the batch
_GROUPS = (
    "augmentation",
    "precision",
)  # typed as group=choice; their files differ in the name alone
_PROBE_SHARE = 0.2  # of `seconds`, for each trial of another setting
_RAM_SHARE = 0.5  # of the free memory that decoded images may take


def run(config: DictConfig, bench: Bench) -> Findings:
    """Record the training, try what might be faster, and say what is; apply=true trains again with it."""
    seconds = config.seconds or SECONDS
    tell = _Steps(bench, len(list(settings(config))) + 3 + config.benchmark.apply)
    tell("the training as it is")
    now = recorded(config, bench, bench.folder / "run", seconds)
    tell("its arithmetic alone")
    arithmetic = resident(config, {}, seconds)
    if arithmetic is None:
        raise SegFitError(
            f"batch_size={config.batch_size} does not fit into memory: set batch_size lower and accumulate higher. "
            f"benchmark=max_batch finds the largest that fits."
        )
    tried = try_settings(config, bench, seconds, arithmetic, now.images, tell)
    facts = facts_of(now, arithmetic, tried)
    found = verdict(facts)
    applied = None
    if config.benchmark.apply and found.best is not None:
        tell(f"the training with {found.best.overrides}")
        applied = apply(config, bench, seconds, found.best, now.timeline)
    return Diagnosis(facts, now.timeline, now.means, found, applied, overrides()).findings()


class _Steps:
    """Counts what is measured."""

    def __init__(self, bench: Bench, total: int) -> None:
        self.bench, self.total, self.done = bench, total, 0

    def __call__(self, what: str) -> None:
        self.bench.progress(what, self.done, self.total)
        self.done = min(self.done + 1, self.total - 1)


@dataclass(frozen=True)
class Recorded:
    """A training that was recorded, and is let go of: what is tried next needs its memory.

    Args:
        config: of it.
        timeline: where its time went.
        means: what the monitor saw meanwhile.
        costs: of a sample.
        copied: seconds to copy one.
        images: of the data set.
        workers: that read them.
        cuda: whether the device is a CUDA card.
    """

    config: DictConfig
    timeline: Timeline
    means: Means
    costs: Costs
    copied: float
    images: int
    workers: int
    cuda: bool


def recorded(config: DictConfig, bench: Bench, folder: Path, seconds: float) -> Recorded:
    """Train as train.py does, TensorBoard and checkpoints in `folder` included, for some seconds."""
    config = changed(
        config, {"epochs": _ENDLESS, "max_steps": None, "patience": None, "resume": None}
    )
    training = make_training(config, folder, bench.notice)
    loader = training.fit.train.batches.loader  # type: ignore[attr-defined]
    dataset: TrainDataset = loader.samples
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
        images=len(dataset),
        workers=loader.num_workers,
        cuda=training.fit.state.device.type == "cuda",
    )


def resident(config: DictConfig, change: Mapping[str, str], seconds: float) -> float | None:
    """Return the median seconds of an update whose batch lies on the device, with a change; None: it does not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    alone = changed(config, {**change, "loader.workers": 0, "data.check": "off", "resume": None})
    try:
        speed = measure_training(alone, seconds=_PROBE_SHARE * seconds, warmup=2, resident=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return float(speed["speed"]["ms_median"]) / 1000


def apply(
    config: DictConfig, bench: Bench, seconds: float, change: Change, before: Timeline
) -> Applied:
    """Train again with a change; return what came of it."""
    folder = bench.folder / "changed"
    after = recorded(changed(config, change.change), bench, folder, seconds).timeline
    gain = (after.images / after.update) / (before.images / before.update)
    return Applied(after, gain)


def facts_of(now: Recorded, arithmetic: float, trials: list[Trial]) -> Facts:
    """Return what the verdict is made from."""
    config, timeline, costs = now.config, now.timeline, now.costs
    per_update = {name: value / timeline.updates for name, value in timeline.phases.items()}
    restart = timeline.restarts / timeline.updates if now.workers else 0.0
    fitted = config.data.fit != "crop"  # the cache holds images of that size already
    cached = Costs(decode=now.copied, fit=0.0 if fitted else costs.fit, augment=costs.augment)
    return Facts(
        cuda=now.cuda,
        images=round(timeline.images),
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
        trials=trials,
    )


def settings(config: DictConfig) -> Iterator[Trial]:
    """Yield the settings of the arithmetic that may be faster than a config's, but for the batch; not yet measured."""
    images = config.batch_size * config.accumulate
    device, _ = resolve_device(config.device)
    native = native_precisions(device)
    if config.augmentation.name == "cpu":
        yield Trial("CPU augmentation", {"augmentation": "kornia-gpu"}, 0.0, images)
    if "fast" in config.model and not config.model.fast:
        yield Trial("the stock model", {"model.fast": "true"}, 0.0, images)
    if config.precision.name == "fp32" and native[0] != "fp32":
        yield Trial("full precision", {"precision": native[0]}, 0.0, images)
    if not config.channels_last:
        yield Trial("channels before pixels", {"channels_last": "true"}, 0.0, images)
    if device.type == "cuda" and not config.compile:
        yield Trial("many small kernels", {"compile": "true"}, 0.0, images)


def try_settings(
    config: DictConfig,
    bench: Bench,
    seconds: float,
    arithmetic: float,
    length: int,
    tell: Callable[[str], None],
) -> list[Trial]:
    """Measure every setting's arithmetic; a batch is doubled as long as that pays.

    Args:
        config: of the training.
        bench: told what does not fit.
        seconds: of the whole recording.
        arithmetic: seconds an update of the config itself.
        length: images of the data set.
        tell: told what is measured.
    """
    tried: list[Trial] = []

    def measure(trial: Trial) -> Trial | None:
        tell(f"the arithmetic with {typed(trial.change)}")
        taken = resident(config, trial.change, seconds)
        if taken is None:
            bench.notice(f"{typed(trial.change)}: does not fit into memory.")
            return None
        tried.append(replace(trial, resident=taken))
        return tried[-1]

    for trial in settings(config):
        measure(trial)
    pace = arithmetic / (config.batch_size * config.accumulate)  # seconds an image
    for trial in larger_batches(config, length):
        measured = measure(trial)
        if measured is None or pace < WORTH * measured.resident / measured.images:
            break
        pace = measured.resident / measured.images
    return tried


def larger_batches(config: DictConfig, length: int) -> Iterator[Trial]:
    """Yield a config with a batch of 2, 4, 8 times the size, and less accumulation in return where there is some.

    Args:
        config: of the training.
        length: images of the data set, which no batch exceeds.
    """
    batch, accumulate = config.batch_size, config.accumulate
    for _ in range(_DOUBLINGS):
        if 2 * batch > length:
            return
        batch, change, remark = 2 * batch, {"batch_size": str(2 * batch)}, ""
        if accumulate % 2 == 0:
            accumulate //= 2
            change["accumulate"] = str(accumulate)
        else:
            remark = "the effective batch grows: lr may have to follow"
        yield Trial("too small a batch", change, 0.0, batch * accumulate, remark)


def changed(config: DictConfig, change: Mapping[str, Any]) -> DictConfig:
    """Return a copy of a config with options set; groups (augmentation, precision) by the name of their choice."""
    copy = config.copy()
    for key, value in change.items():
        OmegaConf.update(copy, f"{key}.name" if key in _GROUPS else key, value)
    return copy


def overrides() -> list[str]:
    """Return what was typed to compose the training; nothing outside of benchmark.py."""
    if not HydraConfig.initialized():
        return []
    mine = ("benchmark=", "benchmark.", "seconds=")
    return [text for text in HydraConfig.get().overrides.task if not text.startswith(mine)]


def _where_cached(now: Recorded) -> str:
    """Return "ram" where decoded images leave half of the free memory, else "disk"."""
    height, width = size_of(now.config.image_size)
    needed = 4 * height * width * now.images
    return "ram" if needed < _RAM_SHARE * psutil.virtual_memory().available else "disk"
