"""The rungs of the ladder: from a plain training loop to everything on, one change after the other."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

CHOSEN_BY_GROUP = ("precision", "augmentation")  # typed as precision=bf16, not precision.name=bf16


@dataclass(frozen=True)
class Machine:
    """What decides which rungs there are.

    Args:
        device_type: "cpu" or "cuda".
        precisions: that the device multiplies natively, the best for training first.
        workers: processes that would read images.
        images: to train on.
    """

    device_type: str
    precisions: Sequence[str]
    workers: int
    images: int


@dataclass(frozen=True)
class Rung:
    """One change of the composition.

    Args:
        name: for tables and figures.
        changes: config key → value.
        missing: why this machine or model has no such rung; empty if it has.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    missing: str = ""


def naive(config: DictConfig) -> Rung:
    """Return the lowest rung: what a plain loop over a plain loader does with this model, batch and data."""
    changes = {
        "precision.name": "fp32",
        "loader.workers": 0,
        "loader.pin_memory": False,
        "loader.persistent": False,
        "loader.non_blocking": False,
        "data.cache": "none",
        "channels_last": False,
        "compile": False,
    }
    if config.augmentation.name != "none":
        changes["augmentation.name"] = "cpu"
    if "fast" in config.model:
        changes["model.fast"] = False
    return Rung("naive", changes)


def rungs(config: DictConfig, machine: Machine) -> list[Rung]:
    """Return the rungs above the lowest, in their order."""
    return [
        _mixed_precision(machine),
        _larger_batch(config, machine),
        _workers(machine),
        _copies(machine),
        Rung("decoded cache", {"data.cache": config.benchmark.cache}),
        _augmentation(config),
        _fast(config),
        Rung("channels_last", {"channels_last": True}),
        Rung("compile", {"compile": True}),
    ]


def with_batch(config: DictConfig, batch_size: int) -> Rung:
    """Return the rung of a larger batch; accumulation makes up for it as far as it can."""
    accumulate = max(1, config.accumulate * config.batch_size // batch_size)
    changes = {"batch_size": batch_size}
    if accumulate != config.accumulate:
        changes["accumulate"] = accumulate
    return Rung(f"batch {batch_size}", changes)


def typed(changes: Mapping[str, Any]) -> str:
    """Return changes as they are typed on a command line."""
    words = []
    for key, value in changes.items():
        group, _, name = key.partition(".")
        key = group if group in CHOSEN_BY_GROUP and name == "name" else key
        words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


def _mixed_precision(machine: Machine) -> Rung:
    best = machine.precisions[0]
    if best == "fp32":
        return Rung(
            "mixed precision",
            missing=f"this {machine.device_type.upper()} has no native bf16 or fp16",
        )
    return Rung(f"mixed precision ({best})", {"precision.name": best})


def _larger_batch(config: DictConfig, machine: Machine) -> Rung:
    wanted = config.benchmark.batch_size or 4 * config.batch_size
    batch = min(wanted, machine.images)
    if batch <= config.batch_size:
        reason = f"batch_size={config.batch_size} is the largest that is asked for, or all images"
        return Rung("larger batch", missing=reason)
    return with_batch(config, batch)


def _workers(machine: Machine) -> Rung:
    if machine.workers == 0:
        return Rung("data workers", missing="there is no core for them")
    changes = {"loader.workers": machine.workers, "loader.persistent": True}
    return Rung(f"{machine.workers} data worker{'s' if machine.workers > 1 else ''}", changes)


def _copies(machine: Machine) -> Rung:
    name = "pinned memory, copies beside the step"
    if machine.device_type != "cuda":
        return Rung(name, missing="there is no card to copy to")
    return Rung(name, {"loader.pin_memory": True, "loader.non_blocking": True})


def _augmentation(config: DictConfig) -> Rung:
    name = "augmentation on the device"
    if config.augmentation.name == "none":
        return Rung(name, missing="augmentation=none: there is nothing to move")
    return Rung(name, {"augmentation.name": "kornia-gpu"})


def _fast(config: DictConfig) -> Rung:
    if "fast" not in config.model:
        return Rung("fast SegFormer", missing=f"model.name={config.model.name} is no SegFormer")
    return Rung("fast SegFormer", {"model.fast": True})
