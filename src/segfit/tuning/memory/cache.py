"""Forecasts, remembered until the config, the code or a library changes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from segfit.config.check import plain
from segfit.config.tasks import schema_of
from segfit.data.preflight import default_cache_dir
from segfit.system.files import replace_text
from segfit.tuning.memory.curve import RECORDED, Forecast

_PACKAGE = Path(__file__).parents[2]
# Whose code decides what an update takes.
_SOURCES = ("assembly", "engine", "models", "tasks", "tuning")
_LIBRARIES = ("kornia", "timm", "torch", "torchmetrics", "transformers")
# Options that memory does not depend on, or that the forecast covers for all values.
_REGARDLESS = (
    "batch_size", "benchmark", "checkpoint", "compile", "device", "epochs", "hardware", "init", "limit_train_batches",
    "limit_val_batches", "loader", "lr", "max_steps", "monitor", "patience", "precision", "report", "resume",
    "scheduler", "seconds", "seed", "val_every",
)  # fmt: skip


def key(config: DictConfig, device_type: str, precision: str, original: tuple[int, ...]) -> str:
    """Return what a forecast depends on, as a short text: options, code and versions of libraries."""
    options = {name: value for name, value in plain(config).items() if name not in _REGARDLESS}
    options["model"].pop("weights", None)
    options["accumulate"] = min(options["accumulate"], RECORDED)
    options["data"] = {
        name: options["data"].get(name) for name in schema_of(config.task.name).MEMORY_OPTIONS
    }
    versions = {name: _version(name) for name in _LIBRARIES}
    text = json.dumps([options, device_type, precision, original, versions], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for folder in _SOURCES:
        for path in sorted((_PACKAGE / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def load(name: str, folder: Path | None = None) -> Forecast | None:
    """Return the forecast that was saved under a key, or None: what cannot be read is as good as absent."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Forecast.from_json(json.loads(_path(name, folder).read_text(encoding="utf-8")))
    return None


def save(name: str, forecast: Forecast, folder: Path | None = None) -> None:
    """Save a forecast; without space or permission, do nothing."""
    path = _path(name, folder)
    with contextlib.suppress(OSError):
        replace_text(path, json.dumps(asdict(forecast)))


def _path(name: str, folder: Path | None) -> Path:
    return (folder or default_cache_dir() / "memory") / f"{name}.json"


def _version(library: str) -> Any:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None
