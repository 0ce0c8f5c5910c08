"""Forecasts of composed configs, remembered until config, code or a library change, and what of a card they leave.

Imports torch only for what is not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
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

# In the order of their lives. "average" is the moving average of the weights.
PARTS = ("parameters", "average", "optimizer", "gradients", "activations", "workspace")

RECORDED = 2  # micro-batches of an update that are recorded at most; a third adds what `Forecast.waiting` says
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
class Curve:
    """The peak as a function of the batch size: the largest of some moments; at each, the memory in use is linear in it."""

    # (moments, 2, PARTS): bytes by part that no sample adds to, and bytes by part of each sample.
    moments: list[list[list[float]]]

    def at(self, batch: int) -> dict[str, float]:
        """Return the bytes by part at the peak; parts that are absent are left out."""
        fixed, each = max(self.moments, key=lambda moment: sum(moment[0]) + batch * sum(moment[1]))
        sizes = {
            part: left + batch * more for part, left, more in zip(PARTS, fixed, each, strict=True)
        }
        return {part: size for part, size in sizes.items() if size > 0}

    def peak(self, batch: int) -> float:
        """Return the bytes at the peak."""
        return max(sum(fixed) + batch * sum(each) for fixed, each in self.moments)

    def largest(self, budget: float) -> float:
        """Return the largest batch that stays within the budget: 0 if none does, infinite if all do."""
        if self.peak(0) > budget:
            return 0
        growing = (moment for moment in self.moments if sum(moment[1]) > 0)
        return min(
            ((budget - sum(fixed)) // sum(each) for fixed, each in growing), default=math.inf
        )

    def plus(self, fixed: float, each: float) -> Curve:
        """Return the same moments with more activations."""
        moments, place = deepcopy(self.moments), PARTS.index("activations")
        for moment in moments:
            moment[0][place] += fixed
            moment[1][place] += each
        return Curve(moments)


@dataclass(frozen=True)
class Forecast:
    """What a composition takes, at any micro-batch."""

    train: Curve  # an update, over the size of its micro-batches
    val: Curve  # a validation, over the size of its batches
    parameters: int  # how many numbers the model has
    # Activations, fixed and of each sample, that each micro-batch beyond the recorded ones adds to every moment.
    waiting: list[float]
    recorded: int  # micro-batches of the update that `train` is about
    fixed_val: bool  # validation goes image by image, whatever the batch

    def peak(self, batch: int) -> float:
        """Return the bytes at the peak of training and validation."""
        return max(self.train.peak(batch), self.val.peak(batch))

    def largest(self, budget: float) -> float:
        """Return the largest micro-batch that stays within the budget: 0 if none does."""
        return min(self.train.largest(budget), self.val.largest(budget))

    def accumulating(self, micro_batches: int) -> Forecast:
        """Return the forecast of updates of so many micro-batches, at least as many as were recorded."""
        more = micro_batches - self.recorded
        train = self.train.plus(*(more * size for size in self.waiting))
        return replace(self, train=train, recorded=micro_batches)


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
    """Return the memory of a checked config's training and validation at any micro-batch, on "cuda" or "cpu".

    `working` is called if the answer is not remembered and takes seconds. Raise a SegFitError if the model cannot be made.
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
