"""conf/hardware/local.yaml: a measured setting as a recipe that hardware=local composes."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.tuned import model_choice, model_options
from segfit.config.check import plain
from segfit.config.tasks import DEFAULT, config_folders, qualified, schema_of
from segfit.errors import SegFitError
from segfit.system.files import replace_text, reporting
from segfit.tuning.change import GROUPS

CONF = Path(__file__).parents[3] / "conf"
MARK = "Written by benchmark=optimize"

# What a recipe says at the top level, in the order of conf/hardware/*.yaml.
_TOP = ("batch_size", "accumulate", "epochs", "lr", "channels_last", "compile")
_GROUPS = (*GROUPS, "scheduler")


def usual_path(task: str) -> Path:
    """Return the file that hardware=local composes for a task."""
    return CONF / "hardware" / ("" if task == DEFAULT else task) / "local.yaml"


def writable(path: Path) -> None:
    """Raise a SegFitError if `path` cannot be written, or is a file that benchmark=optimize did not write."""
    with reporting(f"benchmark.out={path}"):
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise SegFitError(
                f"benchmark.out={path}: benchmark=optimize did not write it. Rename it, or give "
                f"another benchmark.out."
            )
    if not os.access(path.parent, os.W_OK):
        raise SegFitError(
            f"benchmark.out={path}: the folder {path.parent} is not there, or cannot be written to."
        )


def recipe(
    config: DictConfig,
    kept: Mapping[str, Any],
    tuned_for: Mapping[str, Any],
    vram_gb: float | None,
    header: Sequence[str],
) -> str:
    """Return the text of a hardware file that composes to `config`, as far as a recipe goes.

    Args:
        config: the fastest that was found, or the largest.
        kept: its options that are not as they were composed.
        tuned_for: of `segfit.assembly.tuned`.
        vram_gb: of the card, GiB; None: no card.
        header: figures, a line each.
    """
    groups = {"model": model_choice(config)} | {
        name: str(config[name].name) for name in _GROUPS if name in config
    }
    typed = [f"{name}={choice}" for name, choice in groups.items()]
    choices = qualified(typed, config.task.name, config_folders(sys.argv[1:], CONF))
    defaults = [
        {f"override /{name}@_global_.{name}": text.partition("=")[2]}
        for name, text in zip(groups, choices, strict=True)
    ]
    hardware = {"name": "local", "vram_gb": vram_gb, "tuned_for": dict(tuned_for)}
    values = OmegaConf.create({"hardware": hardware})
    sample, _ = next(schema_of(config.task.name).smaller_samples(config, 2.0), ({}, ""))
    model = [
        *model_options(config),
        *(["checkpointing"] if config.model.get("checkpointing") else []),
    ]
    keys = [*(key for key in _TOP if key in config), "loader.workers", "data.cache", *sample]
    keys += [f"model.{key}" for key in model]
    for key in (*keys, *(key for key in kept if key not in groups)):
        OmegaConf.update(values, key, OmegaConf.select(config, key))
    everything = {"defaults": defaults, **plain(values)}
    body = yaml.safe_dump(everything, sort_keys=False, allow_unicode=True, width=110)
    command = f"python train.py task={config.task.name} hardware=local"
    top = ("@package _global_", command, f"{MARK}; it will do so again.")
    return "\n".join([*(f"# {line}" for line in (*top, *header)), body])


def write(path: Path, text: str) -> None:
    """Write a recipe, whole or not at all; raise a SegFitError as `writable` does, or if the disk is full."""
    writable(path)
    with reporting(f"benchmark.out={path}"):
        replace_text(path, text)
