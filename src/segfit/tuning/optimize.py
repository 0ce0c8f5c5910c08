"""benchmark=optimize: one command that turns a machine into a setting, conf/hardware/local.yaml. See docs/optimize.md."""

import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch
from omegaconf import DictConfig

from segfit.assembly.data import check_data, make_sources, workers_of
from segfit.assembly.tuned import tuned_for
from segfit.engine.findings import Findings
from segfit.engine.precision import native_precisions, resolve_precision
from segfit.errors import SegFitError
from segfit.system.cores import free_memory
from segfit.system.hardware import GIB, resolve_device
from segfit.tuning import local_recipe
from segfit.tuning.attempts import NOT_FASTER, SURPASSED, Attempts
from segfit.tuning.batch_trial import by_size
from segfit.tuning.bench import Bench
from segfit.tuning.max_batch import Trials, start
from segfit.tuning.optimize_report import Result, findings_of
from segfit.tuning.rungs import typed
from segfit.tuning.settings import (
    Setting,
    best_micro_batch,
    effective_batch,
    feeding_settings,
    layout_setting,
    micro_batch,
    micro_batches,
    precision_settings,
    worker_settings,
)
from segfit.tuning.trial import run_trial

SECONDS = 4.0
# Of the memory that is free: the rest is for files, data workers, and whatever else runs.
_HOST_SHARE = 0.5


class _NoTime(Exception):  # noqa: N818  (no error: the search ends with what it has found)
    """The batch search has used up its time."""


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure the settings that matter, keep what is faster, write the recipe.

    Raises:
        SegFitError: if not even one image trains here, or the recipe cannot be written.
    """
    deadline = time.monotonic() + 60 * config.benchmark.budget_minutes
    out = local_recipe.LOCAL if config.benchmark.out is None else Path(config.benchmark.out)
    local_recipe.writable(out)
    sources = make_sources(config.data)
    for line in check_data(config, sources).notices:
        bench.notice(line)
    device, _ = resolve_device(config.device)
    images = len(sources["train"])
    effective = effective_batch(config, images)
    attempts = Attempts(
        config, bench, run_trial, seconds=config.seconds or SECONDS, deadline=deadline
    )
    held_out = by_size(sources["val"])[:images]
    fitting = _search(attempts, device, effective, min(images, effective), held_out)
    before, after = attempts.close()
    if before is not None and after is not None and after < before:
        attempts.changes, after = {}, before  # what seemed faster was chance
    result = Result(
        changes=typed(attempts.changes),
        composed=before,
        fastest=after if after is not None else attempts.best,
        composed_batch=int(config.batch_size * config.accumulate),
        effective=int(attempts.config().batch_size * attempts.config().accumulate),
        fitting=fitting,
        tuned_for=tuned_for(attempts.config(), device),
        out=str(out),
    )
    _write(attempts.config(), device, out, result)
    return findings_of(config, attempts.made, result)


def _search(
    attempts: Attempts, device: torch.device, effective: int, cap: int, held_out: list[int]
) -> int:
    """Keep whatever is faster; return the largest micro-batch, up to `cap`, that fits."""
    config = attempts.composed
    native = native_precisions(device)
    precisions = list(
        precision_settings(resolve_precision(config.precision.name, device)[0].name, native)
    )
    attempts.first()
    if attempts.best is not None:
        attempts.climb(precisions)
    fitting = _fitting(attempts, device, cap, held_out)
    if fitting == 0 and config.model.get("checkpointing") is False:
        attempts.changes["model.checkpointing"] = True
        fitting = _fitting(attempts, device, cap, held_out)
    if fitting == 0:
        raise SegFitError(
            "not even one image trains here: lower image_size or choose a smaller model. "
            "benchmark=plan says what helps."
        )
    _choose_micro_batch(attempts, effective, fitting)
    if attempts.made[0].speed is None:
        attempts.climb(precisions)
    attempts.climb([layout_setting(config)])
    _choose_feeding(attempts, device)
    if fitting < cap and attempts.config().model.get("checkpointing") is False:
        _try_checkpointing(attempts, device, effective, cap, held_out)
    wanted = config.benchmark.compile
    if not config.compile and (device.type == "cuda" if wanted is None else wanted):
        attempts.climb([Setting("compile=true", {"compile": True})])
    return fitting


def _choose_micro_batch(attempts: Attempts, effective: int, fitting: int) -> None:
    config, composed = attempts.composed, attempts.best
    before = len(attempts.made)
    batches = micro_batches(effective, fitting)
    found = best_micro_batch(batches, int(config.batch_size), effective, attempts.attempt)
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
    # Learning from more images an update has to be worth it, unless somebody asked for that.
    if asked or same or composed is None or rate > composed:
        attempts.keep(micro_batch(batch, effective), rate)
        for item in attempts.made[before:]:
            if item.verdict == NOT_FASTER and composed is not None and (item.rate or 0) > composed:
                item.verdict = SURPASSED


def _choose_feeding(attempts: Attempts, device: torch.device) -> None:
    """Choose how images come; how many workers pay depends on the rest, so they are tried before and after."""
    workers = list(_other_workers(attempts, device))
    attempts.climb(workers)
    if attempts.climb(feeding_settings(attempts.composed)):
        attempts.climb(_other_workers(attempts, device))


def _other_workers(attempts: Attempts, device: torch.device) -> list[Setting]:
    now = attempts.config()
    current = workers_of(now, device, cached=True)
    now.loader.workers = None
    return list(worker_settings(current, workers_of(now, device)))


def _try_checkpointing(
    attempts: Attempts, device: torch.device, effective: int, cap: int, held_out: list[int]
) -> None:
    """Recompute activations for a larger micro-batch, where memory was the limit."""
    attempts.changes["model.checkpointing"] = True
    most = _fitting(attempts, device, cap, held_out)
    del attempts.changes["model.checkpointing"]
    batch = max(micro_batches(effective, most), default=0)
    if batch > attempts.config().batch_size:
        larger = micro_batch(batch, effective)
        changes = {**larger.changes, "model.checkpointing": True}
        attempts.climb([Setting(f"model.checkpointing=true {larger.name}", changes)])


def _fitting(attempts: Attempts, device: torch.device, cap: int, held_out: list[int]) -> int:
    """Return the largest micro-batch up to `cap` that fits, 0 if none does.

    On the CPU a forecast that needs less than half of the free memory is enough; else max_batch's trials decide.
    """
    config = attempts.config()
    config.accumulate = 1 if cap == 1 else 2  # gradients stay alive between micro-batches
    if config.benchmark.budget_gb is None and device.type == "cpu":
        config.benchmark.budget_gb = _HOST_SHARE * free_memory() / GIB
    end = time.monotonic() + attempts.left() / 2

    def progress(what: str, done: int, total: int) -> None:
        left = end - time.monotonic()
        if left <= 0:
            raise _NoTime
        config.benchmark.timeout_s = max(left, 1.0)
        attempts.bench.progress(what, done, total)

    trials = Trials(config, replace(attempts.bench, progress=progress), held_out)
    try:
        planned = start(trials, cap)
        if device.type == "cpu" and planned == cap:
            return cap
        return trials.largest(start=planned, cap=cap)
    except _NoTime:
        found = max((tried.batch_size for tried in trials.tried if tried.fits), default=0)
        composed = int(config.batch_size) if attempts.best is not None else 0
        return found or min(composed, cap)


def _write(config: DictConfig, device: torch.device, out: Path, result: "Result") -> None:
    vram = None
    if device.type == "cuda":
        vram = round(torch.cuda.get_device_properties(device).total_memory / GIB, 1)
    date = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    header = [
        f"{date}, data={config.data.name} {config.data.get('root') or ''}".strip(),
        result.figures(),
        *result.remarks(),
    ]
    local_recipe.write(out, local_recipe.recipe(config, result.tuned_for, vram, header))
