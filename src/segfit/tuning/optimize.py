"""benchmark=optimize: one command that turns a machine into a setting, conf/hardware/local.yaml. See docs/optimize.md."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly.data import check_data, workers_of
from segfit.assembly.task import assembly_of, planning_of
from segfit.assembly.tuned import tuned_for
from segfit.config.tasks import schema_of
from segfit.engine.findings import Column, Findings, Table
from segfit.engine.precision import native_precisions, resolve_precision
from segfit.errors import SegFitError
from segfit.system.cores import free_memory
from segfit.system.hardware import GIB, resolve_device
from segfit.tuning import local_recipe
from segfit.tuning.bench import Bench
from segfit.tuning.change import Change, augmentation_of
from segfit.tuning.climb import NOT_FASTER, OUT_OF_MEMORY, SPEED_COLUMNS, Climb, Step, bars
from segfit.tuning.max_batch import Trials, start

SECONDS = 4.0
SURPASSED = "another is faster still"
LEAST_EFFECTIVE = 8  # a smaller batch trains neither fast nor, with batch norm, well
LEAST_GAIN = 1.02  # smaller gains are chance
# A measurement is killed after so many seconds, or so many times the first one's.
_PATIENCE, _PATIENCE_TIMES = 60.0, 4.0
# Share of the free memory; the rest is for files, data workers and other programs.
_HOST_SHARE = 0.5
_COLUMNS = (
    Column("setting"),
    Column("samples/s", ".1f"),
    Column("× composed", ".2f"),
    Column("verdict"),
    *SPEED_COLUMNS,
)


class _NoTime(Exception):  # noqa: N818  (no error: the search ends with what it has found)
    """The batch search has used up its time."""


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure the settings that matter, keep what is faster, write the recipe.

    Raises:
        SegFitError: if not even one sample trains here, or the recipe cannot be written.
    """
    deadline = time.monotonic() + 60 * config.benchmark.budget_minutes
    out = local_recipe.LOCAL if config.benchmark.out is None else Path(config.benchmark.out)
    local_recipe.writable(out)
    sources = assembly_of(config).make_sources(config)
    for line in check_data(config, sources).notices:
        bench.notice(line)
    device, _ = resolve_device(config.device)
    samples = len(sources["train"])
    effective = effective_batch(config, samples)
    climb = Climb(
        config,
        bench,
        seconds=config.seconds or SECONDS,
        least_gain=LEAST_GAIN,
        total=12,
        deadline=deadline,
    )
    held_out = planning_of(config).largest_first(sources["val"])[:samples]
    fitting = _search(climb, device, effective, min(samples, effective), held_out)
    before, after = climb.compare()
    if before is not None and after is not None and after < before:
        climb.kept, after = {}, before  # what seemed faster was chance
    best = climb.config()
    values: dict[str, Any] = {
        "changes": Change("result", climb.kept).typed,
        "composed": before,
        "fastest": after if after is not None else climb.best,
        "composed_batch": int(config.batch_size * config.accumulate),
        "effective": int(best.batch_size * best.accumulate),
        "fitting": fitting,
        "tuned_for": tuned_for(best, device),
        "out": str(out),
    }
    values["gain"] = values["fastest"] and before and values["fastest"] / before
    summary = _summary(values)
    vram = None
    if device.type == "cuda":
        vram = round(torch.cuda.get_device_properties(device).total_memory / GIB, 1)
    date = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    header = [f"{date}, data={config.data.name} {config.data.get('root') or ''}".strip(), *summary]
    local_recipe.write(out, local_recipe.recipe(best, values["tuned_for"], vram, header))
    summary.append(f"Written to {out}")
    if out == local_recipe.LOCAL:
        summary[-1] += ". Use it: python train.py hardware=local"
    return _findings(config, climb.steps, values, "\n".join(summary))


def _search(
    climb: Climb, device: torch.device, effective: int, cap: int, held_out: list[int]
) -> int:
    """Keep whatever is faster; return the largest micro-batch, up to `cap`, that fits."""
    config = climb.start_config
    running = resolve_precision(config.precision.name, device)[0].name
    native = native_precisions(device)
    precisions = [set_option("precision", name) for name in native if name != running]
    composed = climb.measure_start(Change("as composed"))
    if composed.speed is None and composed.verdict != OUT_OF_MEMORY:
        raise SegFitError([f"the composed training does not run: {composed.verdict}"])
    climb.patience = max(_PATIENCE, _PATIENCE_TIMES * climb.longest)
    if composed.speed is not None:
        climb.climb(precisions)
    fitting = _fitting(climb, device, cap, held_out)
    if fitting == 0 and config.model.get("checkpointing") is False:
        climb.kept["model.checkpointing"] = True
        fitting = _fitting(climb, device, cap, held_out)
    if fitting == 0:
        raise SegFitError(
            f"not even one sample trains here. {schema_of(config.task.name).MEMORY_ADVICE} benchmark=plan says what "
            f"helps."
        )
    _choose_micro_batch(climb, effective, fitting)
    if composed.speed is None:
        climb.climb(precisions)
    climb.step(set_option("channels_last", not config.channels_last))
    # How many workers pay depends on how samples come, so they are tried before and after.
    climb.climb(_other_workers(climb, device))
    if climb.climb(feeding_changes(config)):
        climb.climb(_other_workers(climb, device))
    if fitting < cap and climb.config().model.get("checkpointing") is False:
        _try_checkpointing(climb, device, effective, cap, held_out)
    wanted = config.benchmark.compile
    if not config.compile and (device.type == "cuda" if wanted is None else wanted):
        climb.step(set_option("compile", True))
    return fitting


def _choose_micro_batch(climb: Climb, effective: int, fitting: int) -> None:
    config, composed = climb.start_config, climb.best
    before = len(climb.steps)
    batches = micro_batches(effective, fitting)
    found = best_micro_batch(batches, int(config.batch_size), effective, climb.attempt)
    if found is None:
        if composed is None:
            raise SegFitError(
                "no batch could be trained in the time given: raise benchmark.budget_minutes, or try "
                "benchmark=max_batch."
            )
        return
    batch, rate = found
    asked = config.benchmark.effective_batch is not None
    same = config.batch_size * config.accumulate == effective
    # Learning from more samples an update has to be worth it, unless it was asked for.
    if asked or same or composed is None or rate > composed:
        climb.keep(micro_batch(batch, effective), rate)
        for step in climb.steps[before:]:
            if step.verdict == NOT_FASTER and composed is not None and (step.rate or 0) > composed:
                step.verdict = SURPASSED


def _other_workers(climb: Climb, device: torch.device) -> list[Change]:
    now = climb.config()
    current = workers_of(now, device, cached=True)
    now.loader.workers = None
    return worker_changes(current, workers_of(now, device))


def _try_checkpointing(
    climb: Climb, device: torch.device, effective: int, cap: int, held_out: list[int]
) -> None:
    """Recompute activations for a larger micro-batch, where memory was the limit."""
    climb.kept["model.checkpointing"] = True
    most = _fitting(climb, device, cap, held_out)
    del climb.kept["model.checkpointing"]
    batch = max(micro_batches(effective, most), default=0)
    if batch > climb.config().batch_size:
        larger = micro_batch(batch, effective)
        options = {**larger.options, "model.checkpointing": True}
        climb.step(Change(f"model.checkpointing=true {larger.name}", options))


def _fitting(climb: Climb, device: torch.device, cap: int, held_out: list[int]) -> int:
    """Return the largest micro-batch up to `cap` that fits, 0 if none does.

    On the CPU a forecast that needs less than half of the free memory is enough; else max_batch's trials decide.
    """
    config = climb.config()
    config.accumulate = 1 if cap == 1 else 2  # gradients stay alive between micro-batches
    if config.benchmark.budget_gb is None and device.type == "cpu":
        config.benchmark.budget_gb = _HOST_SHARE * free_memory() / GIB
    end = time.monotonic() + climb.left() / 2

    def progress(what: str, done: int, total: int) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise _NoTime
        config.benchmark.timeout_s = max(left, 1.0)
        climb.bench.progress(what, done, total)

    trials = Trials(config, replace(climb.bench, progress=progress), held_out)
    try:
        planned = start(trials, cap)
        if device.type == "cpu" and planned == cap:
            return cap
        return trials.largest(start=planned, cap=cap)
    except _NoTime:
        found = max((tried.batch_size for tried in trials.tried if tried.fits), default=0)
        composed = int(config.batch_size) if climb.best is not None else 0
        return found or min(composed, cap)


def _summary(values: dict[str, Any]) -> list[str]:
    """Return what was measured, and what it does to the effective batch, a line each."""
    rate, changes = values["fastest"], values["changes"]
    now = "not measured to the end" if rate is None else f"{rate:.1f} samples/s"
    if not changes:
        lines = ["Nothing was found that is faster than the composed recipe."]
    elif values["gain"] is None:
        lines = [f"The composed recipe does not fit, or was not measured; {now} with {changes}"]
    else:
        lines = [
            f"{values['gain']:.2f} times as fast as the composed recipe: {values['composed']:.1f} → {now} with {changes}"
        ]
    if values["effective"] != values["composed_batch"]:
        lines.append(
            f"The effective batch is {values['effective']}, no longer {values['composed_batch']}; lr is as it was: "
            f"benchmark=lr_find says which goes with it."
        )
    return lines


def _findings(
    config: DictConfig, steps: Sequence[Step], values: dict[str, Any], headline: str
) -> Findings:
    facts = next((step.facts for step in steps if step.facts), {})
    title = f"{facts.get('model', config.model.name)}, {facts.get('sample', '')}"
    composed = steps[0].rate
    rows = [
        [
            step.change.name,
            step.rate,
            step.rate and composed and step.rate / composed,
            step.verdict,
            *step.cells(),
        ]
        for step in steps
    ]
    labels = [
        step.verdict if step.rate is None else f"{step.rate:.1f}  {step.verdict}" for step in steps
    ]
    scalars = {"optimize/samples_per_second": values["fastest"] or 0.0}
    if values["gain"] is not None:
        scalars["optimize/gain"] = values["gain"]
    table = f"{title}: each on top of those that were kept above it"
    figure = partial(bars, steps, labels, f"{title}\n{values['tuned_for']['device']}")
    return Findings(
        headline=headline,
        tables=[Table("trials", table, _COLUMNS, rows)],
        values={**values, "trials": [asdict(step) for step in steps]},
        figures={"optimize": figure},
        scalars=scalars,
    )


def effective_batch(config: DictConfig, samples: int) -> int:
    """Return the effective batch: benchmark.effective_batch, else the composed one, at least 8 of all `samples`."""
    if config.benchmark.effective_batch is not None:
        return int(config.benchmark.effective_batch)
    composed = int(config.batch_size * config.accumulate)
    return max(composed, min(LEAST_EFFECTIVE, samples))


def micro_batches(effective: int, most: int) -> list[int]:
    """Return micro-batches up to `most` that divide the effective batch, each at least 1.5 times the one before."""
    chosen: list[int] = []
    for batch in range(1, min(effective, most) + 1):
        if effective % batch == 0 and (not chosen or batch >= 1.5 * chosen[-1]):
            chosen.append(batch)
    return chosen


def micro_batch(batch: int, effective: int) -> Change:
    """Return the change to a micro-batch; accumulation keeps the effective batch."""
    options = {"batch_size": batch, "accumulate": effective // batch}
    return Change(f"batch_size={batch} × {effective // batch}", options)


def best_micro_batch(
    batches: Sequence[int], start: int, effective: int, attempt: Callable[[Change], float | None]
) -> tuple[int, float] | None:
    """Return the micro-batch at which samples per second stop rising, and them; None if none can be trained.

    `start`, or the nearest that is smaller, is tried first; from there larger ones while they are faster, and if none
    was, smaller ones while they are.

    Args:
        batches: ascending.
        start: of the composed recipe.
        effective: batch, a multiple of each.
        attempt: returns samples per second with a change, or None if it cannot be trained.
    """
    place = max(sum(batch <= start for batch in batches) - 1, 0)

    def while_rising(
        batches: Sequence[int], best: tuple[int, float] | None
    ) -> tuple[int, float] | None:
        for batch in batches:
            rate = attempt(micro_batch(batch, effective))
            if rate is None and best is None:
                continue  # a smaller one may fit
            if rate is None or (best is not None and rate < LEAST_GAIN * best[1]):
                break
            best = batch, rate
        return best

    best = while_rising([batches[place]], None)
    risen = while_rising(batches[place + 1 :], best) if best is not None else None
    return risen if risen != best else while_rising(batches[:place][::-1], best)


def feeding_changes(config: DictConfig) -> Iterator[Change]:
    """Yield the other place of augmentation, and a cache of decoded images if there is none."""
    place = augmentation_of(config)
    if place != "none":
        yield set_option("augmentation", "cpu" if place == "kornia-gpu" else "kornia-gpu")
    if config.data.cache == "none":
        yield set_option("data.cache", "disk")


def worker_changes(current: int, chosen: int) -> list[Change]:
    """Return other numbers of data workers than the current one: `chosen` by cores, half of that, none."""
    others = sorted({chosen, chosen // 2, 0} - {current}, reverse=True)
    return [set_option("loader.workers", workers) for workers in others]


def set_option(key: str, value: str | int) -> Change:
    """Return the change of one option, named as it is typed."""
    change = Change("", {key: value})
    return Change(change.typed, change.options)
