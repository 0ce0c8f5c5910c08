"""benchmark=diagnose: where the time of a training goes, what holds it up, and the one change that helps most."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, replace
from functools import partial
from itertools import count

import numpy as np
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import DictConfig

from segfit.assembly.task import planning_of
from segfit.config.tasks import schema_of
from segfit.engine.findings import Cell, Findings, Table, columns
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.precision import native_precisions
from segfit.system.hardware import resolve_device
from segfit.tuning import Bench
from segfit.tuning.change import Change, augmentation_of, changed, with_batch
from segfit.tuning.measure import explain_out_of_memory, measure_training
from segfit.tuning.timeline import OUTSIDE, Timeline, recorded
from segfit.tuning.verdict import ARITHMETIC, WORTH, Resident, Verdict, verdict

SECONDS = 20.0
_PROBE_SHARE = 0.2  # of `seconds`, for each trial of another setting
_NOTABLE = 0.3  # share of the time from which validation or saving is worth a sentence
# Phase → what it is called and its color, in the order of tables and figures.
_PHASES = {
    "data": ("waiting for data", "#d62728"),
    "copy": ("copying to the device", "#ff9896"),
    "augmentation": ("augmentation, normalising", "#9467bd"),
    "forward": ("forward", "#1f77b4"),
    "backward": ("backward", "#4c9ed9"),
    "optimizer": ("optimizer", "#9ecae9"),
    "logging": ("reading and logging", "#8c564b"),
    "host": ("host, the rest", "#c7c7c7"),
    "validation": ("validation", "#2ca02c"),
    "checkpoint": ("saving", "#98df8a"),
}


def run(config: DictConfig, bench: Bench) -> Findings:
    """Record the training, try what might be faster, and say what is; apply=true trains again with it."""
    seconds = config.seconds or SECONDS
    cuda = resolve_device(config.device)[0].type == "cuda"
    others, done = list(settings(config)), count()
    total = len(others) + 3 + cuda + config.benchmark.apply

    def measuring(what: str) -> None:
        bench.progress(what, min(next(done), total - 1), total)

    measuring("the training as it is")
    facts, timeline, means, samples = recorded(config, bench, bench.folder / "run", seconds)
    measuring("its arithmetic alone")
    with explain_out_of_memory(config):
        now = resident(config, Change("as it is"), seconds)
    launching = 0.0
    if cuda:
        measuring("what launching it takes")  # as many kernels that have next to nothing to do
        *_, (smallest, _) = [({}, ""), *schema_of(config.task.name).smaller_samples(config, 1.0)]
        launching = resident(config, Change("", {**smallest, "batch_size": 2}), seconds).seconds
    tried: list[Resident] = []

    def pace(change: Change) -> float:
        """Return seconds a sample of the arithmetic with a change."""
        measuring(f"the arithmetic with {change.typed}")
        try:
            tried.append(resident(config, change, seconds))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            bench.notice(f"{change.typed}: does not fit into memory.")
            return math.inf
        return tried[-1].seconds / tried[-1].samples

    for change in others:
        pace(change)
    fastest = now.seconds / now.samples
    for change in larger_batches(config, samples):
        before, fastest = fastest, pace(change)
        if before < WORTH * fastest:
            break
    facts = replace(facts, resident=now.seconds, launching=launching, tried=tried)
    found = verdict(facts)
    timelines, best = {"as it is": timeline}, found.best
    applied: Timeline | None = None
    measured = command = None
    if best is not None:
        command = _command(best.change)
        if config.benchmark.apply:
            measuring(f"the training with {best.change.typed}")
            new = changed(config, best.change.options)
            _, applied, *_ = recorded(new, bench, bench.folder / "changed", seconds)
            timelines[best.change.typed], measured = applied, applied.rate / timeline.rate
    title = f"a sample of the {facts.workers} workers, in one process"
    if facts.workers == 0:
        title = "a sample, in the main process"
    names = ("waiting for the disk", "decoding", "fitting to image_size", "augmenting")
    sample = [(name, 1000 * cost) for name, cost in zip(names, astuple(facts.costs), strict=True)]
    tables = [_phases_table(timeline), Table("sample", title, columns("part | ms:.2f"), sample)]
    if found.predictions:
        shown = columns("cures | change | predicted gain:.2f | remark")
        rows = [
            [one.change.name, one.change.typed, one.gain, one.change.remark or None]
            for one in found.predictions
        ]
        tables.append(Table("changes", "what might help", shown, rows, 0 if best else None))
    return Findings(
        headline=_headline(timeline, found, measured, command),
        tables=tables,
        values={
            "bottleneck": found.bottleneck,
            "change": best and dict(text.split("=", 1) for text in best.change.overrides),
            "command": command,
            "predicted_gain": best and best.gain,
            "measured_gain": measured,
            "facts": asdict(facts),
            "timeline": asdict(timeline),
            "applied": applied and asdict(applied),
            "device": asdict(means),
        },
        figures={"phases": partial(_figure, timelines)},
        scalars={f"phase/{name}": share for name, share in timeline.by_phase().items()},
    )


def resident(config: DictConfig, change: Change, seconds: float) -> Resident:
    """Return what a change makes of an update whose batch lies on the device: the median of some updates."""
    release_memory()
    new = changed(config, change.options)
    alone = changed(new, {"loader.workers": 0, "data.check": "off", "resume": None})
    probe = measure_training(alone, seconds=_PROBE_SHARE * seconds, warmup=2, resident=True)
    return Resident(change, probe["speed"]["ms_median"] / 1000, new.batch_size * new.accumulate)


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
    if device.type == "cuda" and "compile" not in idle:
        if not config.compile:
            yield Change("many small kernels", {"compile": True})
        elif config.compile_mode == "default" and config.accumulate == 1:
            yield Change("many small kernels", {"compile_mode": "reduce-overhead"})


def larger_batches(config: DictConfig, length: int) -> Iterator[Change]:
    """Yield a batch of 2, 4, 8 times the size, at most `length`; with less accumulation if there is some."""
    for batch in (config.batch_size * times for times in (2, 4, 8)):
        if batch <= length:
            yield replace(with_batch(config, batch), name="too small a batch")


def _headline(
    timeline: Timeline, found: Verdict, measured: float | None, command: str | None
) -> str:
    shares, best = timeline.by_phase(), found.best
    waiting = shares.get("data", 0.0)
    arithmetic = sum(shares.get(name, 0.0) for name in ARITHMETIC)
    where = f"{arithmetic:.0%} of the time is the model's own arithmetic."
    if waiting > arithmetic:
        where = f"{waiting:.0%} of the time waits for data."
    sentences = [where, f"Bottleneck: {found.bottleneck}."]
    if best is None:
        sentences.append("Nothing that was tried makes it faster.")
    else:
        promise = "" if measured is None else f", measured {measured:.2f}x"
        sentences.append(f"Use {best.change.typed}: predicted {best.gain:.2f}x{promise}.")
        if best.change.remark:
            sentences.append(f"({best.change.remark})")
    for phase, option in zip(OUTSIDE, ("val_every", "checkpoint.every_minutes"), strict=True):
        if shares.get(phase, 0.0) > _NOTABLE:
            name = _PHASES[phase][0].capitalize()
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
    shown = columns("phase | ms an update:.2f | % of the time:.1f")
    rows: list[list[Cell]] = []
    ms = 1000 * timeline.seconds / timeline.updates
    for name, (label, _) in _PHASES.items():
        if name not in shares:
            continue
        rows.append([label, shares[name] * ms, 100 * shares[name]])
        if timeline.device:
            there = name in timeline.device and name in ("copy", *ARITHMETIC)
            rows[-1].append(1000 * timeline.device[name] / timeline.updates if there else None)
    if timeline.device:
        shown += columns("device ms:.2f")
    title = (
        f"{timeline.updates} updates of {timeline.samples:g} samples, {timeline.epochs} epochs begun: "
        f"{1000 * timeline.update:.1f} ms an update, {timeline.rate:.1f} samples/s without validation and saving"
    )
    return Table("phases", title, shown, rows)


def _figure(timelines: dict[str, Timeline]) -> Figure:
    """Draw a stacked bar of milliseconds per sample for each timeline, by phase."""
    figure = Figure(figsize=(9, 1.8 + 0.7 * len(timelines)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    bars = dict(reversed(timelines.items()))
    starts = np.zeros(len(bars))
    for name, (label, color) in _PHASES.items():
        shares = np.array([one.by_phase().get(name, 0.0) for one in bars.values()])
        widths = shares * [1e3 * one.seconds / (one.updates * one.samples) for one in bars.values()]
        axes.barh(list(bars), widths, left=starts, color=color, label=label, height=0.6)
        starts = starts + widths
    axes.set_xlabel("ms a sample")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure
