"""Forecasts of composed configs, remembered until config, code or a library change, and what of a card they leave.

Imports torch only for what is not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import psutil
from omegaconf import DictConfig

from segfit.config.check import plain
from segfit.config.tasks import schema_of
from segfit.data.preflight import default_cache_dir
from segfit.system.cards import GIB, visible_gpus
from segfit.system.files import replace_text
from segfit.system.hardware import cpu_has_bf16
from segfit.tuning.memory.curve import RECORDED, Curve, Forecast

LARGEST = 2**20  # no batch is larger
MARGIN = 0.10  # how far off a forecast may be, and what the allocator loses to gaps between blocks
# Of a CUDA process besides tensors: context, kernels and handles of cuBLAS and cuDNN. Assumed, not measured.
CONTEXT = 0.6 * GIB
# Of a Python process with torch, transformers and timm, besides tensors. Assumed, too.
PROCESS = 0.7 * GIB

# Whose code decides what an update takes.
_SOURCES = ("assembly", "engine", "models", "tasks", "tuning")
_LIBRARIES = ("kornia", "timm", "torch", "torchmetrics", "transformers")
# Options that memory does not depend on, or that the forecast covers for all values.
_REGARDLESS = (
    "batch_size", "benchmark", "checkpoint", "compile", "device", "epochs", "hardware", "init", "limit_train_batches",
    "limit_val_batches", "loader", "lr", "max_steps", "monitor", "patience", "precision", "report", "resume",
    "scheduler", "seconds", "seed", "val_every",
)  # fmt: skip


@dataclass(frozen=True)
class Card:
    """Where a training is to fit: "cuda" or "cpu", and GiB."""

    device_type: str
    gib: float

    @property
    def name(self) -> str:
        """Its name in tables."""
        return f"{self.gib:.3g} GB" if self.device_type == "cuda" else f"{self.gib:.0f} GiB of RAM"

    @property
    def context(self) -> float:
        """Bytes that are taken before the first tensor."""
        return CONTEXT if self.device_type == "cuda" else PROCESS

    @property
    def budget(self) -> float:
        """Bytes that a forecast may come to: context and margin are left free."""
        return (self.gib * GIB - self.context) / (1 + MARGIN)

    def largest(self, forecast: Forecast) -> int:
        """Return the largest micro-batch that fits; 0: none does."""
        return int(min(forecast.largest(self.budget), LARGEST))

    def needed(self, peak: float) -> float:
        """Return the bytes that a forecast of `peak` bytes asks of the card, margin included."""
        return peak * (1 + MARGIN) + self.context


def card_of(config: DictConfig) -> Card:
    """Return the smaller of the card that a recipe is made for and the one in this machine; without either, the CPU."""
    if config.device != "cpu":
        recipe = config.hardware.vram_gb
        sizes = [gpu.total_gib for gpu in visible_gpus()[:1]]
        if recipe is not None:
            sizes.append(float(recipe))
        if sizes:
            return Card("cuda", min(sizes))
    return Card("cpu", psutil.virtual_memory().total / GIB)


def planned_precision(config: DictConfig, device_type: str) -> str:
    """Return the precision that will run; "auto" on a card: bf16, which takes the memory that fp16 does."""
    wanted = str(config.precision.name)
    if device_type == "cuda":
        return "bf16" if wanted == "auto" else wanted
    native = ["bf16", "fp32"] if cpu_has_bf16() else ["fp32"]
    return wanted if wanted in native else native[0]


def forecast_of(
    config: DictConfig, device_type: str, *, working: Callable[[], None] = lambda: None
) -> Forecast:
    """Return the memory of a config's training and validation at any micro-batch.

    Args:
        config: checked; its batch_size does not matter.
        device_type: "cuda" or "cpu".
        working: called if the answer is not remembered and takes seconds.

    Raises:
        SegFitError: if the model cannot be made.
    """
    precision = planned_precision(config, device_type)
    original = schema_of(config.task.name).held_out_shape(config)
    path = default_cache_dir() / "memory" / f"{key(config, device_type, precision, original)}.json"
    result = _remembered(path)
    if result is None:
        working()
        from segfit.tuning.memory.predict import predict  # torch and all that comes with it

        result = predict(config, device_type, precision, original)
        with contextlib.suppress(OSError):  # without space or permission it is not remembered
            replace_text(path, json.dumps(asdict(result)))
    return result.accumulating(config.accumulate)


def _remembered(path: Path) -> Forecast | None:
    """Return the forecast in a file, or None: what cannot be read is as good as absent."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        values = json.loads(path.read_text(encoding="utf-8"))
        return Forecast(**values | {name: Curve(**values[name]) for name in ("train", "val")})
    return None


def key(config: DictConfig, device_type: str, precision: str, original: tuple[int, ...]) -> str:
    """Return what a forecast depends on, as a short text: options, code and versions of libraries."""
    options = {name: value for name, value in plain(config).items() if name not in _REGARDLESS}
    options["model"].pop("weights", None)
    options["accumulate"] = min(options["accumulate"], RECORDED)
    options["data"] = {
        name: options["data"].get(name) for name in schema_of(config.task.name).MEMORY_OPTIONS
    }
    versions = [metadata.version(name) for name in _LIBRARIES]
    text = json.dumps([options, device_type, precision, original, versions], sort_keys=True)
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for folder in _SOURCES:
        for path in sorted((Path(__file__).parents[2] / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()
