"""What a training has of an earlier run: all of it (`resume`), or weights to start from (`init`); and its samples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.config.check import flat, plain
from segfit.data.source import Source, some
from segfit.data.splits import groups_of
from segfit.engine.checkpoint import Checkpoints, load_checkpoint
from segfit.engine.optim import base_rate
from segfit.engine.state import TrainingState
from segfit.errors import SegFitError, raise_all
from segfit.runs.files import RunFolder, read_json
from segfit.runs.folder import may_change
from segfit.system.hardware import device_name

Notice = Callable[[str], None]
# Split → name → content key, "" if unknown: what was trained on is not taken for held out once files come or go.
Samples: TypeAlias = Mapping[str, Mapping[str, str]]


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
    before, now = content["about"], checkpoints.about
    _refuse_other_config(before["config"], now["config"], checkpoints)
    try:
        state.load_state_dict(content)
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise SegFitError(
            f"{checkpoints.last} does not fit the run's config.yaml ({str(error).splitlines()[0]}). "
            f"Was one of the two replaced?"
        ) from error
    if (before.get("device"), before.get("batch_size")) != (now["device"], now["batch_size"]):
        state.progress.micro_batch = state.progress.held_out_batch = 0  # what fits is found again
    _tell_differences(before, now, notice)
    was, epochs = (one["config"].get("epochs") for one in (before, now))
    if was != epochs:
        progress, (last, *_) = state.progress, content["optimizer"]["param_groups"]
        rates = []
        # The last one is that of the present update again.
        done = progress.update + state.schedule_offset
        for update in (progress.epoch * updates_per_epoch, epochs * updates_per_epoch, done):
            state.scheduler.step_update(update)
            rates.append(base_rate(state.optimizer.param_groups[0]))
        notice(
            f"epochs was {was}, is {epochs}: the schedule ({now['config']['scheduler.name']}) now spans {epochs} epochs. The "
            f"learning rate was {base_rate(last):.3g}; in epoch {progress.epoch + 1} it begins at "
            f"{rates[0]:.3g}, and it ends at {rates[1]:.3g}."
        )


def _tell_differences(before: Mapping[str, Any], now: Mapping[str, Any], notice: Notice) -> None:
    """Say what cannot be continued exactly, by `about` of the checkpoint and of now."""

    def changes(*keys: str) -> str:
        changed = [key for key in keys if before.get(key) != now[key]]
        return "; ".join(f"{key} was {before.get(key)}, is {now[key]}" for key in changed)

    sizes = changes("batch_size", "world_size", "samples_per_update")
    if "samples_per_update" in sizes:
        notice(
            f"resuming with another effective batch ({sizes}): no image of the epoch is missed or seen twice and the "
            f"learning rate continues from the same share of the training, but the curve is another one."
        )
    elif sizes:
        notice(
            f"resuming with other micro-batches ({sizes}) of the same effective batch: the same images in every update; "
            f"batch norm, dropout and augmentation on the device see them in other groups."
        )
    if other := changes("device", "precision", "torch"):
        notice(f"resuming elsewhere ({other}): the same training, but not bit for bit.")


def _refuse_other_config(
    before: Mapping[str, Any], now: Mapping[str, Any], checkpoints: Checkpoints
) -> None:
    file = RunFolder(checkpoints.last.parent.parent).config
    problems = []
    for key in sorted({*before, *now}):
        was, value = (repr(one[key]) if key in one else "not there" for one in (before, now))
        if was != value and not may_change(key):
            problems.append(
                f"{file}: {key} is {value}, but the run was trained with {was}. Put it back, or start another run."
            )
    raise_all(problems)


@dataclass(frozen=True)
class Start:
    """What `init` names."""

    path: Path  # the file
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]  # of the run that they are from, by dotted keys
    samples: Samples  # of that run, if its folder is there


def read_start(init: str) -> Start:
    """Return the weights of a run's folder or of one of its .pt files; raise a SegFitError if they cannot be had."""
    path = Path(init).expanduser()
    if path.is_dir():
        run = RunFolder(path)
        folder = Checkpoints(run.checkpoints if run.config.is_file() else path)
        path = folder.best if folder.best.exists() else folder.last
    try:
        content = load_checkpoint(path)
        run = RunFolder(path.absolute().parent.parent)
        weights, config = dict(content.get("ema") or content["model"]), content["about"]["config"]
        return Start(path, weights, config, read_samples(run.samples))
    except SegFitError as error:
        raise SegFitError([f"init={init}: {problem}" for problem in error.problems]) from error
    except (LookupError, TypeError, ValueError) as error:
        raise SegFitError(f"init={init}: {path} is no checkpoint of a run.") from error


def start_from(
    model: nn.Module, start: Start, config: Mapping[str, Any], notice: Notice
) -> list[str]:
    """Copy into the model of a config what fits of a start; report the rest, and return the names of what stays random.

    Raises a SegFitError if that is less than half of the numbers outside of the last layer.
    """
    rows, theirs = _classes(config), _classes(start.config)
    kept = [name for name in rows if name in theirs]
    taken, new = dict[str, Tensor](), list[str]()
    fitting = total = 0
    for name, own in model.state_dict().items():
        given, last = start.weights.get(name), bool(rows) and "classifier" in name.split(".")
        if not isinstance(given, Tensor):
            given = None
        elif last and given.shape == (len(theirs), *own.shape[1:]):
            merged = own.clone()
            merged[[rows.index(row) for row in kept]] = given[[theirs.index(row) for row in kept]]
            given = merged
        elif given.ndim == own.ndim == 4 and given.shape[1] == 3 != own.shape[1]:
            from timm.models import adapt_input_conv

            given = adapt_input_conv(own.shape[1], given)  # RGB there, bands here
        if given is not None and given.shape == own.shape:
            taken[name] = given
        else:
            new.append(name)
        if not last:
            fitting, total = fitting + own.numel() * (name in taken), total + own.numel()
    if 2 * fitting < total:
        raise SegFitError(
            f"init={start.path}: only {fitting:,} of {total:,} numbers fit: it holds a {start.config.get('model.name')} with "
            f"other options, or another model. Choose model and model.… as its run's config.yaml has them."
        )
    model.load_state_dict(taken, strict=False)
    changes = {
        "classes taken over": kept if rows != theirs else [],
        "new classes": [name for name in rows if name not in theirs],
        "classes that are gone": [name for name in theirs if name not in rows],
        "not in it, so random": [name for name in new if name not in start.weights],
        "of another shape there, so random": [name for name in new if name in start.weights],
        "not used": sorted({*start.weights} - {*taken, *new}),
    }
    summary = [f"init={start.path}: {len(taken)} of {len(taken) + len(new)} tensors taken"]
    summary += [f"{what}: {some(names)}" for what, names in changes.items() if names]
    notice("; ".join(summary) + ".")
    return new


def _classes(config: Mapping[str, Any]) -> list[str]:
    """Return what the rows of the layers called classifier stand for; nothing for tasks without classes."""
    count = config.get("data.num_classes", 0)
    return config.get("data.class_names") or [f"class_{index}" for index in range(count)]


def samples_of(sources: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Return what is known of the samples that are files; contents once the pre-flight has looked at them."""
    return {
        split: {name: source.contents.get(name, "") for name in source.names}
        for split, source in sources.items()
        if hasattr(source, "contents")
    }


def read_samples(path: Path) -> dict[str, dict[str, str]]:
    """Return a run's list, empty where it has none; raise a SegFitError if the file holds anything else."""
    found = read_json(path)
    plain = all(isinstance(names, dict) for names in found.values())
    if not plain or not all(isinstance(k, str) for one in found.values() for k in one.values()):
        raise SegFitError(f"{path}: no list of samples. Delete it, and splits are drawn anew.")
    return found


def kept_splits(
    config: DictConfig, sources: Mapping[str, Source], before: Samples
) -> dict[str, Source]:
    """Return sources whose drawn splits keep each sample of an earlier run, and the rest of its group, where it was."""
    found: dict[str, Any] = dict(sources)
    pool = getattr(found.get("train"), "pool", None)
    drawn = [split for split, source in found.items() if getattr(source, "pool", ()) is pool]
    if len(drawn) < 2 or not before:
        return found
    group, kept = config.data.split.group, dict[str, str]()
    for split in drawn:
        kept |= dict.fromkeys(groups_of(list(before.get(split, ())), group), split)
    placed: dict[str, list[str]] = {split: [] for split in drawn}
    for split in drawn:
        names = found[split].names
        for name, key in zip(names, groups_of(names, group), strict=True):
            placed[kept.get(key, split)].append(name)
    return found | {split: replace(found[split], names=sorted(placed[split])) for split in drawn}


def differences(before: Samples, now: Samples) -> list[str]:
    """Return what was added, removed or changed since a run, and what was trained on and is held out, a line a split."""
    lines = []
    train = {**before.get("train", {}), **now.get("train", {})}
    trained = {key.partition(" ")[0]: name for name, key in train.items() if key}
    for split, names in now.items():
        old = before.get(split, {})
        changes = {
            "added": names.keys() - old.keys(),
            "removed": old.keys() - names.keys(),
            "changed": {
                name for name, key in names.items() if key and old.get(name, key) not in ("", key)
            },
        }
        said = [
            f"{len(them)} {what} ({some(sorted(them))})" for what, them in changes.items() if them
        ]
        if old and said:
            lines.append(f"{split} is not what the run had: {', '.join(said)}.")
        if split == "train":
            continue
        seen = []
        for name, key in names.items():
            there = trained.get(key.partition(" ")[0])
            if there is not None:
                seen.append(name if there == name else f"{name} (there {there})")
            elif not key and old and name in train and name not in old:
                seen.append(name)
        if seen:
            lines.append(
                f"{split}: {len(seen)} of {len(names)} are among what was trained on, so its scores are too good: "
                f"{some(seen)}. Take them out of train or {split}."
            )
    return lines
