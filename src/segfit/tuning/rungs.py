"""The rungs of the ladder: from a plain training loop to everything on, one change after the other."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from segfit.tuning.change import Change, augmentation_of


@dataclass(frozen=True)
class Machine:
    """What decides which rungs there are.

    Args:
        device_type: "cpu" or "cuda".
        precisions: that the device multiplies natively, the best for training first.
        workers: data workers.
        samples: to train on.
    """

    device_type: str
    precisions: Sequence[str]
    workers: int
    samples: int


def naive(config: DictConfig) -> Change:
    """Return the lowest rung: what a plain loop over a plain loader does with this model, batch and data."""
    options = {
        "precision": "fp32",
        "loader.workers": 0,
        "loader.pin_memory": False,
        "loader.persistent": False,
        "loader.non_blocking": False,
        "data.cache": "none",
        "channels_last": False,
        "compile": False,
    }
    if augmentation_of(config) != "none":
        options["augmentation"] = "cpu"
    if "fast" in config.model:
        options["model.fast"] = False
    return Change("naive", options)


def rungs(config: DictConfig, machine: Machine) -> list[Change]:
    """Return the rungs above the lowest, in their order."""
    best, kind = machine.precisions[0], machine.device_type
    larger = min(config.benchmark.batch_size or 4 * config.batch_size, machine.samples)
    workers = f"{machine.workers} data worker{'s' if machine.workers > 1 else ''}"
    copies = "pinned memory, copies beside the step"
    on_device = "augmentation on the device"
    return [
        Change("mixed precision", missing=f"this {kind.upper()} has no native bf16 or fp16")
        if best == "fp32"
        else Change(f"mixed precision ({best})", {"precision": best}),
        Change(
            "larger batch",
            missing=f"batch_size={config.batch_size} is the largest that is asked for, or all samples",
        )
        if larger <= config.batch_size
        else with_batch(config, larger),
        Change("data workers", missing="there is no core for them")
        if machine.workers == 0
        else Change(workers, {"loader.workers": machine.workers, "loader.persistent": True}),
        Change(copies, {"loader.pin_memory": True, "loader.non_blocking": True})
        if kind == "cuda"
        else Change(copies, missing="there is no card to copy to"),
        Change("decoded cache", {"data.cache": config.benchmark.cache}),
        Change(on_device, missing="augmentation=none: there is nothing to move")
        if augmentation_of(config) == "none"
        else Change(on_device, {"augmentation": "kornia-gpu"}),
        Change("fast SegFormer", {"model.fast": True})
        if "fast" in config.model
        else Change("fast SegFormer", missing=f"model.name={config.model.name} is no SegFormer"),
        Change("channels_last", {"channels_last": True}),
        Change("compile", {"compile": True}),
    ]


def with_batch(config: DictConfig, batch_size: int) -> Change:
    """Return the rung of a larger batch; accumulation is lowered by as much, as far as there is any."""
    accumulate = max(1, config.accumulate * config.batch_size // batch_size)
    options = {"batch_size": batch_size}
    if accumulate != config.accumulate:
        options["accumulate"] = accumulate
    return Change(f"batch {batch_size}", options)


def smaller(config: DictConfig, rung: Change) -> Iterator[Change]:
    """Yield half of a larger batch, a quarter, and so on, as long as it is larger than the config's."""
    batch = rung.options.get("batch_size", 0) // 2
    while batch > config.batch_size:
        yield with_batch(config, batch)
        batch //= 2
