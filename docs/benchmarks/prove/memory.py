"""Part "memory": what benchmark=plan predicts, against what is taken."""

from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig

from prove.shared import DEVICE, GIB, called, composed, named, read, taken, training
from segfit.engine.evaluate import evaluate
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.step import make_update
from segfit.tuning.measure import first_held_out, first_window, recorded_peak
from segfit.tuning.memory.planner import forecast_of


def predicted(
    *,
    toy: bool,
    variant: str,
    pixels: int,
    precision: str,
    accumulate: int,
    search: bool,
    batches: list[int],
) -> Any:
    """Return GiB that were predicted, allocated, reserved, and taken by NVML, for each micro-batch.

    `search`: cuDNN tries algorithms, in the first update, with more memory than it takes to use them: "first".
    """
    found: dict[str, Any] = {}
    for batch in batches:
        size = (f"image_size={pixels}", f"batch_size={batch}", f"accumulate={accumulate}")
        config = composed(
            *named(f"segformer_{variant}", toy), *size, f"precision={precision}",
            f"data.train_size={batch * accumulate}", toy=toy,
        )  # fmt: skip
        forecast = forecast_of(config, DEVICE.type)  # the same for all batches
        try:
            found[str(batch)] = {"predicted": forecast.peak(batch) / GIB, **_taken(config, search)}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found[str(batch)] = {"predicted": forecast.peak(batch) / GIB, "allocated": None}
        release_memory()
    return found


def _taken(config: DictConfig, search: bool) -> dict[str, float]:
    cuda, first = DEVICE.type == "cuda", 0.0
    with recorded_peak(DEVICE) as peak:
        fit = training(config).fit
        torch.backends.cudnn.benchmark = search
        fit.state.model.train()
        window = first_window(fit)
        for number in range(3):
            if cuda and number == 1:
                first = torch.cuda.max_memory_allocated(DEVICE) / GIB
                torch.cuda.reset_peak_memory_stats(DEVICE)
            seeds = range(number, number + len(window))
            make_update(fit.state, fit.task, window, seeds, config.clip_grad_norm)
        del window
        evaluate(fit.state.evaluated(), fit.task, [first_held_out(fit)], fit.state.precision)
    found = {"allocated": peak.bytes / GIB, "taken": taken()}
    if cuda:
        found |= {"first": first, "reserved": torch.cuda.max_memory_reserved(DEVICE) / GIB}
    return found


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
    sizes = ("batch_size=2", "data.train_size=8", "data.val_size=2", "epochs=2")
    fit = training(composed(*named("cnn", toy), *sizes, toy=toy)).fit
    owner, name = {
        "augmentation": (type(fit.task), "prepare"),
        "forward": (fit.state, "forward"),
        "optimizer": (fit.state.optimizer, "step"),
        "validation": (type(fit.task.meter()), "update"),
    }[where]
    # In the second epoch, when there is a checkpoint to go back to; augmentation is refused anyway.
    failing = 2 if where == "validation" else 6
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
    return {"refused": where == "augmentation", "ended": ended, "notices": notices}


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
