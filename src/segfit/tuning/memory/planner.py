"""Forecasts of composed configs, and what of a card's memory they leave. Imports torch only for what is not remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import psutil
from omegaconf import DictConfig

from segfit.config.tasks import schema_of
from segfit.system.cards import GIB, visible_gpus
from segfit.system.hardware import cpu_has_bf16
from segfit.tuning.memory import cache
from segfit.tuning.memory.curve import Forecast

LARGEST = 2**20  # no batch is larger
MARGIN = 0.10  # how far off a forecast may be, and what the allocator loses to gaps between blocks
# Of a CUDA process besides tensors: context, kernels and handles of cuBLAS and cuDNN. Assumed, not measured.
CONTEXT = 0.6 * GIB
# Of a Python process with torch, transformers and timm, besides tensors. Assumed, too.
PROCESS = 0.7 * GIB


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
    name = cache.key(config, device_type, precision, original)
    result = cache.load(name)
    if result is None:
        working()
        from segfit.tuning.memory.predict import predict  # torch and all that comes with it

        result = predict(config, device_type, precision, original)
        cache.save(name, result)
    return result.accumulating(config.accumulate)
