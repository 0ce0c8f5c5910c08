"""conf/hardware/local.yaml: a measured setting as a recipe that hardware=local composes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from segfit.assembly.tuned import model_choice
from segfit.config.check import plain
from segfit.errors import SegFitError
from segfit.system.files import replace_text
from segfit.tuning.change import GROUPS

LOCAL = Path(__file__).parents[3] / "conf" / "hardware" / "local.yaml"
MARK = "Written by benchmark=optimize"

# What a recipe says at the top level, in the order of conf/hardware/*.yaml.
_TOP = (
    "batch_size", "accumulate", "image_size", "epochs", "lr", "channels_last", "compile",
)  # fmt: skip
_GROUPS = (*GROUPS, "scheduler")


def writable(path: Path) -> None:
    """Raise a SegFitError if `path` cannot be written, or is a file that benchmark=optimize did not write."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise SegFitError(
                f"benchmark.out={path}: the folder {path.parent} is not there, or cannot be written to."
            ) from None
        return
    except (OSError, UnicodeDecodeError) as error:
        raise SegFitError(f"benchmark.out={path}: {error}.") from error
    if MARK not in text:
        raise SegFitError(
            f"benchmark.out={path}: benchmark=optimize did not write it. Rename it, or give "
            f"another benchmark.out."
        )


def recipe(
    config: DictConfig, tuned_for: Mapping[str, Any], vram_gb: float | None, header: Sequence[str]
) -> str:
    """Return the text of a hardware file that composes to `config`, as far as a recipe goes.

    Args:
        config: the fastest that was found.
        tuned_for: of `segfit.assembly.tuned`.
        vram_gb: of the card, GiB; None: no card.
        header: figures, a line each.
    """
    groups = {"model": model_choice(config)} | {
        name: str(config[name].name) for name in _GROUPS if name in config
    }
    values: dict[str, Any] = {
        "defaults": [
            {f"override /{name}@_global_.{name}": choice} for name, choice in groups.items()
        ],
        "hardware": {"name": "local", "vram_gb": vram_gb, "tuned_for": dict(tuned_for)},
        **{key: plain(config)[key] for key in _TOP if key in config},
        "loader": {"workers": config.loader.workers},
        "data": {"cache": str(config.data.cache)},
    }
    if config.model.get("checkpointing"):  # not every model has the key
        values["model"] = {"checkpointing": True}
    body = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
    top = ("@package _global_", "python train.py hardware=local", f"{MARK}; it will do so again.")
    return "\n".join([*(f"# {line}" for line in (*top, *header)), body])


def write(path: Path, text: str) -> None:
    """Write a recipe, whole or not at all.

    Raises:
        SegFitError: as `writable`, or if the disk is full.
    """
    writable(path)
    try:
        replace_text(path, text)
    except OSError as error:
        raise SegFitError(f"benchmark.out={path}: {error.strerror}.") from error
