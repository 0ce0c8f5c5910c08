"""The schema of benchmark.py: a training's config, and what is measured about it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from segfit.config.schema import REQUIRED, RunConfig, option


@dataclass
class ModeConfig:
    """What every mode has."""

    name: str = option(REQUIRED, "Which module of segfit.tuning answers.")


@dataclass
class BenchmarkOptions:
    """What benchmark.py has besides the composition that would be trained."""

    benchmark: ModeConfig = REQUIRED
    seconds: float | None = option(
        None, "How long each measurement (monitor: the watch) lasts; null: the mode's own.", gt=0
    )


@cache
def benchmark_schema(run: type[RunConfig]) -> type:
    """Return the schema of benchmark.py for runs of a schema."""
    return dataclass(type("BenchmarkConfig", (BenchmarkOptions, run), {}))


@dataclass
class MonitorConfig(ModeConfig):
    """Utilisation, memory, temperature and power, once a second."""

    name: str = "monitor"


@dataclass
class DataModeConfig(ModeConfig):
    """Training samples as the network will see them, with what the check of the data set found."""

    name: str = "data"
    samples: int = option(12, "Images on the page, spread evenly over those to train on.", ge=1)


@dataclass
class DiagnoseConfig(ModeConfig):
    """Where a training's time goes, and the one change that helps most."""

    name: str = "diagnose"
    apply: bool = option(False, "Train again with the change, and measure whether it helps.")
    warmup: int = option(5, "Updates that are made before anything is timed.", ge=0)
    slow_disk_ms: float = option(
        0.0, "Wait so long in every read of an image, to see what a slow disk does.", ge=0
    )


@dataclass
class PlanConfig(ModeConfig):
    """Predicted memory: will it fit, and what does? Lists make it a table."""

    name: str = "plan"
    models: list[str] | None = option(
        None,
        "Compare these; null: the composed one.",
        choices=("b0", "b1", "b2", "b3", "b4", "b5", "cnn", "timm_unet"),
    )
    sizes: list[int] | None = option(
        None, "Compare these sides in pixels; null: image_size.", ge=32
    )
    tiers: list[float] | None = option(
        None, "Against cards of so many GiB; null: hardware.vram_gb.", gt=0
    )
    original_size: Any = option(
        None,
        "Side in pixels, or [height, width], of the largest held-out image; null: image_size, with "
        "data.fit=crop twice that.",
    )


@dataclass
class ThroughputConfig(ModeConfig):
    """How fast a composition trains and predicts, with its data and without."""

    name: str = "throughput"
    warmup: int = option(5, "Steps that are made before anything is timed.", ge=0)


@dataclass
class MaxBatchConfig(ModeConfig):
    """The largest micro-batch that trains, found by training with it."""

    name: str = "max_batch"
    budget_gb: float | None = option(
        None,
        "GiB that tensors may take; null: what is free on the card, or in the host's memory on the CPU.",
        gt=0,
    )
    margin: float = option(0.1, "Share of it that is kept free.", ge=0, lt=1)
    slowdown: float = option(
        2.0,
        "On CUDA a batch that is so many times slower per sample than a smaller one counts as too large.",
        gt=1,
    )
    timeout_s: float = option(600.0, "A batch that takes longer to try counts as too large.", gt=0)


@dataclass
class OptimizeConfig(MaxBatchConfig):
    """The fastest setting that can be found in some minutes, or the largest that is fast enough, as hardware=local."""

    name: str = "optimize"
    budget_minutes: float = option(8.0, "Time for everything together.", gt=0)
    effective_batch: int | None = option(
        None, "batch_size × accumulate of the result; null: the composed one, at least 8.", ge=1
    )
    out: str | None = option(None, "The file to write; null: conf/hardware/local.yaml.")
    warmup: int = option(3, "Updates that are made before anything is timed.", ge=0)
    compile: bool | None = option(
        None, "Try compile=true, too; null: on CUDA only. It takes minutes."
    )
    grow: bool = option(
        False, "Then make model and samples larger while they fit and min_speed is kept."
    )
    min_speed: float = option(
        0.5, "Share of the composed samples per second that grow keeps.", gt=0
    )


@dataclass
class LrFindConfig(ModeConfig):
    """The learning rate at which the loss falls fastest."""

    name: str = "lr_find"
    first: float = option(1e-6, "Learning rate of the sweep's first update.", gt=0)
    last: float = option(1.0, "Of its last; it ends earlier where the loss diverges.", gt=0)
    updates: int = option(100, "Updates of a sweep that does not diverge.", ge=10)
    smoothing: float = option(
        0.9, "Weight of the past in the running mean of the loss.", ge=0, lt=1
    )
    divergence: float = option(
        4.0, "The sweep ends where the smoothed loss is so many times its smallest.", gt=1
    )


@dataclass
class LadderConfig(ModeConfig):
    """What each step from a plain training loop to everything on brings."""

    name: str = "ladder"
    batch_size: int | None = option(
        None, "The larger micro-batch, halved until it fits; null: four times batch_size.", ge=1
    )
    workers: int | None = option(None, "Data workers; null: by cores, at least one.", ge=0)
    cache: str = option("disk", "Where decoded images are kept.", choices=("ram", "disk"))
    warmup: int = option(5, "Updates that are made before anything is timed.", ge=0)
    timeout_s: float = option(
        900.0, "A rung that takes longer, compiling included, is left out.", gt=0
    )


@dataclass
class LoaderModeConfig(ModeConfig):
    """How fast batches come, and the smallest setting that outruns the model."""

    name: str = "loader"
    workers: list[int] | None = option(
        None, "Counts of data workers; null: 0, powers of two, and all cores.", ge=0
    )
    prefetch: list[int] = option([2, 4], "Batches that each worker keeps ready.", ge=1)
    caches: list[str] = option(
        ["none", "disk"], "Where decoded images are kept.", choices=("none", "disk", "ram")
    )
    warmup: int = option(5, "Updates of the model that are made before it is timed.", ge=0)


@dataclass
class SegformerModeConfig(ModeConfig):
    """The fast SegFormer against transformers' own."""

    name: str = "segformer"
    variants: list[str] | None = option(
        None, "Encoder sizes; null: model.variant.", choices=("b0", "b1", "b2", "b3", "b4", "b5")
    )
    precisions: list[str] | None = option(
        None, "Precisions; null: that of the group.", choices=("fp32", "fp16", "bf16")
    )
    rounds: int = option(
        5, "Alternating rounds of three steps with each of the two; shown are medians.", ge=3
    )


MODES: dict[str, type[ModeConfig]] = {
    "data": DataModeConfig,
    "diagnose": DiagnoseConfig,
    "lr_find": LrFindConfig,
    "max_batch": MaxBatchConfig,
    "monitor": MonitorConfig,
    "optimize": OptimizeConfig,
    "plan": PlanConfig,
    "throughput": ThroughputConfig,
    "ladder": LadderConfig,
    "loader": LoaderModeConfig,
    "segformer": SegformerModeConfig,
}
