"""Part "memory": what benchmark=plan predicts, against what is taken."""

from typing import Any
from unittest import mock

import torch

from prove.shared import DEVICE, GIB, called, composed, named, read, taken, training
from segfit.engine.evaluate import evaluate
from segfit.engine.step import make_update
from segfit.tuning.measure import first_held_out, first_window, recorded_peak
from segfit.tuning.memory.planner import forecast_of


def predicted(
    *,
    toy: bool,
    variant: str,
    pixels: int,
    batch: int,
    precision: str,
    accumulate: int,
    search: bool,
) -> Any:
    """Return GiB that were predicted, allocated, reserved, and taken by NVML; `search`: cuDNN tries algorithms."""
    size = (f"image_size={pixels}", f"batch_size={batch}", f"accumulate={accumulate}")
    model = named(f"segformer_{variant}", toy)
    config = composed(*model, *size, f"precision={precision}", toy=toy)
    forecast = forecast_of(config, DEVICE.type)
    with recorded_peak(DEVICE) as peak:
        fit = training(config).fit
        torch.backends.cudnn.benchmark = search
        fit.state.model.train()
        window = first_window(fit)
        for number in range(3):
            seeds = range(number, number + accumulate)
            make_update(fit.state, fit.task, window, seeds, config.clip_grad_norm)
        del window
        evaluate(fit.state.evaluated(), fit.task, [first_held_out(fit)], fit.state.precision)
    cuda = DEVICE.type == "cuda"
    return {
        "predicted": forecast.peak(batch) / GIB,
        "allocated": peak.bytes / GIB,
        "reserved": torch.cuda.max_memory_reserved(DEVICE) / GIB if cuda else None,
        "taken": taken(),
    }


def _limit(gib: float) -> None:
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))


def recipe(*, toy: bool, tier: str, gib: int) -> Any:
    """Train by a recipe with no more memory than its card has; return the micro-batch that it ended with."""
    _limit(gib - 0.6)  # the context is not counted by torch's limit
    small = ["model=cnn", "model.base_channels=8"] if toy else ["model.weights=null"]
    limits = ("max_steps=4", "limit_val_batches=1", "epochs=1", "loader.workers=0")
    config = composed(f"hardware={tier}", *small, *limits, "data=shapes", base=(), toy=toy)
    fit = training(config).fit
    notices: list[str] = []
    fit.run(_Listener(notices), {})
    return {"micro_batch": fit.state.progress.micro_batch or config.batch_size, "notices": notices}


class _Listener:
    """A listener that keeps notices."""

    def __init__(self, notices: list[str]) -> None:
        self.notice = notices.append

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


def runs_out(*, toy: bool, where: str) -> Any:
    """Let memory run out once in a part of the step; return what was said and how the training ended."""
    fit = training(composed(*named("cnn", toy), "max_steps=4", "epochs=1", toy=toy)).fit
    owner, name = {
        "augmentation": (type(fit.task), "prepare"),
        "forward": (fit.state, "forward"),
        "optimizer": (fit.state.optimizer, "step"),
        "validation": (type(fit.task.meter()), "update"),
    }[where]
    failing = 1 if where == "validation" else 2
    inner, calls, notices = getattr(owner, name), [], []

    def fails_once(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == failing:
            torch.empty(2**50, dtype=torch.uint8, device=DEVICE)  # more than any card has
        return inner(*given, **named)

    with mock.patch.object(owner, name, fails_once):
        try:
            ended = fit.run(_Listener(notices), {}).reason
        except Exception as error:
            ended = f"{type(error).__name__}: {error}"
    return {"ended": ended, "notices": notices}


def largest(*, toy: bool) -> Any:
    """Return the largest micro-batch that benchmark=max_batch finds beside plan's answer for the same memory."""
    gib = 0.05 if toy else 8.0
    options = [*named("cnn" if toy else "segformer_b0", toy), "precision=fp32"]
    options.append(f"data.train_size={64 if toy else 1024}")  # no batch is larger
    more = ["benchmark=max_batch", f"benchmark.budget_gb={gib}", "benchmark.margin=0"]
    folder, _ = called("benchmark.py", *more, *options, toy=toy)
    found = read(folder / "results.json")["values"]
    planned = forecast_of(composed(*options, toy=toy), DEVICE.type).largest(gib * GIB)
    tried = [[one[key] for key in ("batch_size", "verdict", "peak_gib")] for one in found["trials"]]
    answers = {"planned": planned, "max_batch": found["batch_size"]}
    return {**answers, "samples": found["samples"], "tried": tried}
