"""Resuming a run: what it was, what it is now, and notices about the difference."""

from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly.state import Notice
from segfit.config.check import flat, plain
from segfit.engine.checkpoint import Checkpoints
from segfit.engine.optim import base_rate
from segfit.engine.state import TrainingState
from segfit.errors import SegFitError
from segfit.runs.folder import RunFolder, may_change
from segfit.system.hardware import device_name


def about(config: DictConfig, state: TrainingState) -> dict[str, Any]:
    """Return what a checkpoint says of the training that made it, as plain values."""
    return {
        "config": flat(plain(config)),
        "samples_per_update": config.batch_size * config.accumulate * state.distributed.size,
        "batch_size": config.batch_size,
        "world_size": state.distributed.size,
        "device": device_name(state.device),
        "precision": state.precision.name,
        "torch": str(torch.__version__),
    }


def resume(
    state: TrainingState, checkpoints: Checkpoints, notice: Notice, updates_per_epoch: int
) -> None:
    """Load the last whole checkpoint of a run; log what cannot continue exactly as it was.

    Raises a SegFitError if no checkpoint is whole, it is foreign, or was made under another config.
    """
    if not checkpoints.exist():
        notice(f"{checkpoints.last}: nothing was saved yet; starting from the beginning.")
        return
    content, damaged = checkpoints.load_last()
    if damaged is not None:
        notice(damaged)
    before = content.get("about")
    before = before if isinstance(before, dict) else {}
    now = checkpoints.about
    _refuse_other_config(before.get("config"), now["config"], checkpoints)
    try:
        state.load_state_dict(content)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise SegFitError(
            f"{checkpoints.last} does not fit the run's config.yaml ({str(error).splitlines()[0]}). "
            f"Was one of the two replaced?"
        ) from error
    if (before.get("device"), before.get("batch_size")) != (now["device"], now["batch_size"]):
        state.progress.micro_batch = state.progress.held_out_batch = 0  # what fits is found again
    for line in differences(before, now):
        notice(line)
    was, epochs = (one["config"].get("epochs") for one in (before, now))
    if was != epochs:
        (last, *_), progress = content["optimizer"]["param_groups"], state.progress
        here, end = (
            _rate_after(state, epoch * updates_per_epoch) for epoch in (progress.epoch, epochs)
        )
        notice(
            f"epochs was {was}, is {epochs}: the schedule ({now['config']['scheduler.name']}) now spans {epochs} epochs. The "
            f"learning rate was {base_rate(last):.3g}; in epoch {progress.epoch + 1} it begins at "
            f"{here:.3g}, and it ends at {end:.3g}."
        )


def _rate_after(state: TrainingState, updates: int) -> float:
    """Return the learning rate after so many updates of the schedule, which is left as it was."""
    state.scheduler.step_update(updates)
    rate = base_rate(state.optimizer.param_groups[0])
    state.scheduler.step_update(state.progress.update + state.schedule_offset)
    return rate


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what cannot be continued exactly, a line each, by `about` of the checkpoint and of now."""

    def changes(*keys: str) -> str:
        return "; ".join(
            f"{key} was {before.get(key)}, is {now[key]}"
            for key in keys
            if before.get(key) != now[key]
        )

    lines = []
    sizes = changes("batch_size", "world_size", "samples_per_update")
    if before.get("samples_per_update") != now["samples_per_update"]:
        lines.append(
            f"resuming with another effective batch ({sizes}): no image of the epoch is missed or seen twice and the "
            f"learning rate continues from the same share of the training, but the curve is another one."
        )
    elif sizes:
        lines.append(
            f"resuming with other micro-batches ({sizes}) of the same effective batch: the same images in every update; "
            f"batch norm, dropout and augmentation on the device see them in other groups."
        )
    other = changes("device", "precision", "torch")
    if other:
        lines.append(f"resuming elsewhere ({other}): the same training, but not bit for bit.")
    return lines


def _refuse_other_config(before: object, now: Mapping[str, Any], checkpoints: Checkpoints) -> None:
    if not (isinstance(before, dict) and all(isinstance(key, str) for key in before)):
        raise SegFitError(f"{checkpoints.last}: not a checkpoint of this version of SegFit.")
    file = RunFolder(checkpoints.last.parent.parent).config
    problems = []
    for key in sorted({*before, *now}):
        was, value = (repr(one[key]) if key in one else "not there" for one in (before, now))
        if was != value and not may_change(key):
            problems.append(
                f"{file}: {key} is {value}, but the run was trained with {was}. Put it back, or start another run."
            )
    if problems:
        raise SegFitError(problems)
