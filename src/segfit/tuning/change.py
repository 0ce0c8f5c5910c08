"""A change of a training's options: what it is called, how it is typed, and the config that it makes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

GROUPS = ("augmentation", "precision")  # typed as group=choice; their files differ only in the name


@dataclass(frozen=True)
class Change:
    """New values of some options."""

    name: str  # for tables and figures
    options: Mapping[str, Any] = field(default_factory=dict)  # of `GROUPS`: the choice's name
    remark: str = ""  # what else it changes, or what its gain depends on

    @property
    def overrides(self) -> list[str]:
        """The options as command-line overrides."""
        return [f"{key}={_text(value)}" for key, value in self.options.items()]

    @property
    def typed(self) -> str:
        """The overrides as one line."""
        return " ".join(self.overrides)


def changed(config: DictConfig, options: Mapping[str, Any]) -> DictConfig:
    """Return a copy of a config with new values of options."""
    copy = config.copy()
    for key, value in options.items():
        OmegaConf.update(copy, _path(key), value)
    return copy


def with_batch(config: DictConfig, batch_size: int) -> Change:
    """Return the change to a larger micro-batch; accumulation is lowered as far as the effective batch allows."""
    effective = config.batch_size * config.accumulate
    accumulate = math.ceil(effective / batch_size)
    options = {"batch_size": batch_size}
    if accumulate != config.accumulate:
        options["accumulate"] = accumulate
    grows = accumulate * batch_size > effective
    remark = "the effective batch grows: lr may have to follow" if grows else ""
    return Change(f"batch {batch_size}", options, remark)


def thawed(config: DictConfig) -> DictConfig:
    """Return a config without `freeze`, if its layers are frozen for the first epochs only: it needs the most once they train."""
    return changed(
        config, {"freeze": None} if (config.freeze_epochs or config.epochs) < config.epochs else {}
    )


def differing(config: DictConfig, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have another value in a config."""
    return {
        key: value
        for key, value in options.items()
        if OmegaConf.select(config, _path(key)) != value
    }


def _path(key: str) -> str:
    return f"{key}.name" if key in GROUPS else key


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


def augmentation_of(config: DictConfig) -> str:
    """Return where a config augments: "none", "cpu" or "kornia-gpu"; "none" for tasks without that group."""
    return str(config.augmentation.name) if "augmentation" in config else "none"
