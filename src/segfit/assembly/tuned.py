"""What a measured setting holds for, and a line if it is used for something else."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.task import assembly_of
from segfit.config.check import plain
from segfit.config.tasks import schema_of
from segfit.system.cards import driver_version
from segfit.system.hardware import device_name

# Keys of models that change neither how fast they are, nor what fits, or that are measured themselves.
_NOT_SPEED = ("name", "variant", "weights", "dropout", "drop_path", "checkpointing")


def tuned_for(config: DictConfig, device: torch.device) -> dict[str, str | None]:
    """Return what a setting that is measured now, with this config, holds for, as text.

    It has the keys of `TunedForConfig`; driver is None on the CPU.
    """
    sample = assembly_of(config).example_input(config, 1, torch.device("cpu")).shape[1:]
    return {
        "device": device_name(device),
        "driver": driver_version() if device.type == "cuda" else None,
        "torch": str(torch.__version__),  # a class of its own
        "model": model_label(config),
        "sample": " × ".join(map(str, sample)),
    }


def model_choice(config: DictConfig) -> str:
    """Return the file of conf/model that a config's model comes from."""
    variant = config.model.get("variant")
    return f"{config.model.name}_{variant}" if variant else str(config.model.name)


def model_label(config: DictConfig) -> str:
    """Return a model's choice and its unusual options as one line."""
    changed = (f"{key}={value}" for key, value in model_options(config).items())
    return " ".join([model_choice(config), *changed])


def model_options(config: DictConfig) -> dict[str, Any]:
    """Return the options that decide how fast a model is, where they are not the usual ones."""
    usual = OmegaConf.structured(schema_of(config.task.name).GROUPS["model"][config.model.name])
    given: dict[str, Any] = plain(config.model)
    return {
        key: value for key, value in given.items() if key not in _NOT_SPEED and value != usual[key]
    }


def stale(config: DictConfig, device: torch.device) -> str | None:
    """Return a line that says why the recipe's measurements do not hold here, or None where they do."""
    if config.hardware.tuned_for is None:
        return None
    then, now = plain(config.hardware.tuned_for), tuned_for(config, device)
    differences = [
        f"{key}: then {then[key] or 'none'}, now {value or 'none'}"
        for key, value in now.items()
        if then[key] != value
    ]
    if not differences:
        return None
    return (
        f"hardware={config.hardware.name} was measured for something else ({'; '.join(differences)}). It may be slow, "
        f"or not fit. Measure again: python benchmark.py benchmark=optimize"
    )
