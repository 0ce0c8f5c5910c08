"""benchmark=diagnose: where the time of a training goes, what holds it up, and the one change that helps most."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.task import planning_of
from segfit.assembly.training import make_training
from segfit.config.tasks import schema_of
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.precision import native_precisions
from segfit.errors import SegFitError
from segfit.report.lines import LineReport
from segfit.report.session import run_listener
from segfit.runs.folder import RunFolder
from segfit.system.cores import available_cores
from segfit.system.hardware import resolve_device
from segfit.system.monitor import Means, Monitor, summed_up
from segfit.tuning.bench import Bench
from segfit.tuning.change import Change, augmentation_of, changed
from segfit.tuning.measure import measure_training
from segfit.tuning.samples import SlowSource, measure_costs
from segfit.tuning.timeline import OUTSIDE, Timeline, record
from segfit.tuning.verdict import ARITHMETIC, WORTH, Costs, Facts, Resident, Verdict, verdict

SECONDS = 20.0
_ENDLESS = 1_000_000  # epochs
_DOUBLINGS = 3  # of the batch
_PROBE_SHARE = 0.2  # of `seconds`, for each trial of another setting
_RAM_SHARE = 0.5  # of the free memory that decoded images may take
_ORDER = ("data", "copy", *ARITHMETIC, "logging", "host", *OUTSIDE)
_LABELS = {
    "data": "waiting for data",
    "copy": "copying to the device",
    "augmentation": "augmentation, normalising",
    "logging": "reading and logging",
    "host": "host, the rest",
    "checkpoint": "saving",
}
_COLORS = (
    "#d62728", "#ff9896", "#9467bd", "#1f77b4", "#4c9ed9", "#9ecae9", "#8c564b", "#c7c7c7", "#2ca02c", "#98df8a",
)  # fmt: skip
_NOTABLE = 0.3  # share of the time from which validation or saving is worth a sentence


def run(config: DictConfig, bench: Bench) -> Findings:
    """Record the training, try what might be faster, and say what is; apply=true trains again with it."""
    seconds = config.seconds or SECONDS
    cuda = resolve_device(config.device)[0].type == "cuda"
    total = len(list(settings(config))) + 3 + cuda + config.benchmark.apply
    names: list[str] = []

    def measuring(what: str) -> None:
        bench.progress(what, min(len(names), total - 1), total)
        names.append(what)

    measuring("the training as it is")
    facts, timeline, means, samples = recorded(config, bench, bench.folder / "run", seconds)
    measuring("its arithmetic alone")
    arithmetic = resident(config, {}, seconds)
    if arithmetic is None:
        raise SegFitError(
            f"batch_size={config.batch_size} does not fit into memory: set batch_size lower and accumulate higher. "
            f"benchmark=max_batch finds the largest that fits."
        )
    launching = 0.0
    if cuda:
        measuring("what launching it takes")
        launching = resident(config, _smallest(config), seconds) or arithmetic
    tried = try_settings(config, bench, seconds, arithmetic, samples, measuring)
    facts = replace(facts, resident=arithmetic, launching=launching, tried=tried)
    found = verdict(facts)
    applied = None
    if config.benchmark.apply and found.best is not None:
        measuring(f"the training with {found.best.change.typed}")
        with_change = changed(config, found.best.change.options)
        _, applied, _, _ = recorded(with_change, bench, bench.folder / "changed", seconds)
    return _findings(facts, timeline, means, found, applied)


def recorded(
    config: DictConfig, bench: Bench, folder: Path, seconds: float
) -> tuple[Facts, Timeline, Means, int]:
    """Train as train.py does, TensorBoard and checkpoints in `folder` included, for some seconds.

    Nothing of the training is kept: what is tried next needs the memory.

    Returns:
        The facts, except for `resident`, `launching` and `tried`; where the time went; the monitor's means; samples of the data set.
    """
    config = changed(
        config, {"epochs": _ENDLESS, "max_steps": None, "patience": None, "resume": None}
    )
    training = make_training(config, folder, bench.notice)
    loader = training.fit.train.batches.loader  # type: ignore[attr-defined]
    dataset = loader.samples
    if config.benchmark.slow_disk_ms and config.data.cache == "none":
        dataset.source = SlowSource(dataset.source, config.benchmark.slow_disk_ms / 1000)
    costs, copied = measure_costs(dataset)
    silent, text = LineReport(lambda _: None), OmegaConf.to_yaml(config)
    listener = run_listener(RunFolder(folder), silent, config.report.logger, text, training.hparams)
    with Monitor(min(1.0, seconds / 10)) as monitor:
        timeline = record(
            training.fit,
            listener,
            batch_size=config.batch_size,
            seconds=seconds,
            warmup=config.benchmark.warmup,
        )
    restart = timeline.restarts / timeline.updates if loader.num_workers else 0.0
    fitted = config.data.get("fit") != "crop"  # the cache holds samples of that size already
    cached = Costs(decode=copied, fit=0.0 if fitted else costs.fit, augment=costs.augment)
    decoded = planning_of(config).sample_bytes(config) * len(dataset)
    facts = Facts(
        cuda=training.fit.state.device.type == "cuda",
        samples=round(timeline.samples),
        update=timeline.update,
        phases={name: value / timeline.updates for name, value in timeline.phases.items()},
        resident=0.0,
        launching=0.0,
        costs=costs,
        workers=loader.num_workers,
        cores=available_cores(),
        threads=torch.get_num_threads(),
        restart=restart,
        refill=min(restart, timeline.epochs * config.batch_size * costs.total / timeline.updates),
        cached=cached if config.data.cache == "none" else None,
        pin_memory=config.loader.pin_memory,
        non_blocking=config.loader.non_blocking,
        persistent=config.loader.persistent,
        log_every=config.report.log_every,
        idle=list(planning_of(config).feeding(config).idle),
        cache="ram" if decoded < _RAM_SHARE * psutil.virtual_memory().available else "disk",
    )
    return facts, timeline, summed_up(monitor.samples), len(dataset)


def resident(config: DictConfig, options: Mapping[str, Any], seconds: float) -> float | None:
    """Return the median seconds of an update whose batch lies on the device, with changed options; None: it does not fit."""
    release_memory()
    alone = changed(config, {**options, "loader.workers": 0, "data.check": "off", "resume": None})
    try:
        speed = measure_training(alone, seconds=_PROBE_SHARE * seconds, warmup=2, resident=True)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    return float(speed["speed"]["ms_median"]) / 1000


def _smallest(config: DictConfig) -> dict[str, Any]:
    """Return options for as many kernels that have next to nothing to do."""
    every = schema_of(config.task.name).smaller_samples(config, 1.0)
    *_, (samples, _) = [({}, ""), *every]
    return {**samples, "batch_size": 2}


def settings(config: DictConfig) -> Iterator[Change]:
    """Yield changes of the arithmetic that may be faster, except for the batch; each named by what it removes."""
    device, _ = resolve_device(config.device)
    native, idle = native_precisions(device), planning_of(config).feeding(config).idle
    if augmentation_of(config) == "cpu":
        yield Change("CPU augmentation", {"augmentation": "kornia-gpu"})
    if "fast" in config.model and not config.model.fast:
        yield Change("the stock model", {"model.fast": True})
    if config.precision.name == "fp32" and native[0] != "fp32":
        yield Change("full precision", {"precision": native[0]})
    if not config.channels_last and "channels_last" not in idle:
        yield Change("channels before pixels", {"channels_last": True})
    if device.type == "cuda" and not config.compile and "compile" not in idle:
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

    The config's own takes `arithmetic` seconds an update, the whole recording `seconds`, and the data set has `length`
    samples; `measuring` is called with what comes next.
    """
    tried: list[Resident] = []

    def pace(change: Change) -> float:
        """Return seconds a sample."""
        measuring(f"the arithmetic with {change.typed}")
        taken = resident(config, change.options, seconds)
        if taken is None:
            bench.notice(f"{change.typed}: does not fit into memory.")
            return float("inf")
        new = changed(config, change.options)
        tried.append(Resident(change, taken, new.batch_size * new.accumulate))
        return taken / tried[-1].samples

    for change in settings(config):
        pace(change)
    now = arithmetic / (config.batch_size * config.accumulate)
    for change in larger_batches(config, length):
        before, now = now, pace(change)
        if before < WORTH * now:
            break
    return tried


def larger_batches(config: DictConfig, length: int) -> Iterator[Change]:
    """Yield a batch of 2, 4, 8 times the size, at most `length`; with less accumulation if there is some."""
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


def _findings(
    facts: Facts, timeline: Timeline, means: Means, found: Verdict, applied: Timeline | None
) -> Findings:
    best = found.best.change if found.best else None
    measured = applied.rate / timeline.rate if applied is not None else None
    command = _command(best) if best else None
    costs = facts.costs
    sample = [
        ("waiting for the disk", 1000 * costs.wait),
        ("decoding", 1000 * costs.decode),
        ("fitting to image_size", 1000 * costs.fit),
        ("augmenting", 1000 * costs.augment),
    ]
    title = f"a sample of the {facts.workers} workers, in one process"
    if facts.workers == 0:
        title = "a sample, in the main process"
    tables = [
        _phases_table(timeline),
        Table("sample", title, (Column("part"), Column("ms", ".2f")), sample),
    ]
    if found.predictions:
        names = ("cures", "change", "predicted gain", "remark")
        columns = [Column(name, ".2f" if "gain" in name else "") for name in names]
        rows = [
            [one.change.name, one.change.typed, one.gain, one.change.remark or None]
            for one in found.predictions
        ]
        emphasis = 0 if best is not None else None
        tables.append(Table("changes", "what might help", columns, rows, emphasis))
    timelines = {"as it is": timeline}
    if applied is not None and best is not None:
        timelines[best.typed] = applied
    return Findings(
        headline=_headline(timeline, found, measured, command),
        tables=tables,
        values={
            "bottleneck": found.bottleneck,
            "change": best and dict(text.split("=", 1) for text in best.overrides),
            "command": command,
            "predicted_gain": found.best and found.best.gain,
            "measured_gain": measured,
            "facts": asdict(facts),
            "timeline": asdict(timeline),
            "applied": applied and asdict(applied),
            "device": asdict(means),
        },
        figures={"phases": partial(_figure, timelines)},
        scalars={f"phase/{name}": share for name, share in timeline.by_phase().items()},
    )


def _headline(
    timeline: Timeline, found: Verdict, measured: float | None, command: str | None
) -> str:
    shares, best = timeline.by_phase(), found.best
    waiting = shares.get("data", 0.0)
    arithmetic = sum(shares.get(name, 0.0) for name in ARITHMETIC)
    sentences = [f"{arithmetic:.0%} of the time is the model's own arithmetic."]
    if waiting > arithmetic:
        sentences = [f"{waiting:.0%} of the time waits for data."]
    sentences.append(f"Bottleneck: {found.bottleneck}.")
    if best is None:
        sentences.append("Nothing that was tried makes it faster.")
    else:
        promise = "" if measured is None else f", measured {measured:.2f}x"
        sentences.append(f"Use {best.change.typed}: predicted {best.gain:.2f}x{promise}.")
        if best.change.remark:
            sentences.append(f"({best.change.remark})")
    for phase, option in zip(OUTSIDE, ("val_every", "checkpoint.every_minutes"), strict=True):
        if shares.get(phase, 0.0) > _NOTABLE:
            name = _LABELS.get(phase, phase).capitalize()
            sentences.append(f"{name} takes {shares[phase]:.0%} of the time: see {option}.")
    return " ".join([*sentences, f"\n{command}"] if command else sentences)


def _command(best: Change) -> str:
    """Return what trains with the change: what was typed, without the options of benchmark.py."""
    typed: Sequence[str] = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    mine = ("benchmark=", "benchmark.", "seconds=")
    kept = [
        text
        for text in typed
        if not text.startswith(mine) and text.split("=")[0].lstrip("+~") not in best.options
    ]
    return shlex.join(["python", "train.py", *kept, *best.overrides])


def _phases_table(timeline: Timeline) -> Table:
    shares = timeline.by_phase()
    columns = [Column("phase"), Column("ms an update", ".2f"), Column("% of the time", ".1f")]
    rows: list[list[Cell]] = []
    for name in (name for name in _ORDER if name in shares):
        seconds = shares[name] * timeline.seconds / timeline.updates
        rows.append([_LABELS.get(name, name), 1000 * seconds, 100 * shares[name]])
        if timeline.device:
            there = name in timeline.device and name in ("copy", *ARITHMETIC)
            rows[-1].append(1000 * timeline.device[name] / timeline.updates if there else None)
    if timeline.device:
        columns.append(Column("device ms", ".2f"))
    title = (
        f"{timeline.updates} updates of {timeline.samples:g} samples, {timeline.epochs} epochs begun: "
        f"{1000 * timeline.update:.1f} ms an update, {timeline.rate:.1f} samples/s without validation and saving"
    )
    return Table("phases", title, columns, rows)


def _figure(timelines: dict[str, Timeline]) -> Figure:
    """Draw a stacked bar of milliseconds per sample for each timeline, by phase."""
    figure = Figure(figsize=(9, 1.8 + 0.7 * len(timelines)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    bars = dict(reversed(timelines.items()))
    starts = np.zeros(len(bars))
    for name, color in zip(_ORDER, _COLORS, strict=True):
        shares = np.array([one.by_phase().get(name, 0.0) for one in bars.values()])
        widths = shares * [1e3 * one.seconds / (one.updates * one.samples) for one in bars.values()]
        label = _LABELS.get(name, name)
        axes.barh(list(bars), widths, left=starts, color=color, label=label, height=0.6)
        starts = starts + widths
    axes.set_xlabel("ms a sample")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure
