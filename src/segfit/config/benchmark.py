"""The schema of benchmark.py: a training's config, and what is measured about it."""

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
    seconds: float | None = option(None, "Of a measurement (or watch); null: the mode's own.", gt=0)


@cache
def benchmark_schema(run: type[RunConfig]) -> type:
    """Return the schema of benchmark.py for runs of a schema."""
    return dataclass(type("BenchmarkConfig", (BenchmarkOptions, run), {}))


@dataclass
class TimedConfig(ModeConfig):
    """What modes that time updates have."""

    warmup: int = option(5, "Updates that are made before anything is timed.", ge=0)


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
class DiagnoseConfig(TimedConfig):
    """Where a training's time goes, and the one change that helps most."""

    name: str = "diagnose"
    apply: bool = option(False, "Train again with the change, and measure whether it helps.")
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
    sizes: list[int] | None = option(None, "Compare these sides; null: image_size.", ge=32)
    tiers: list[float] | None = option(None, "Cards of so many GiB; null: hardware.vram_gb.", gt=0)
    original_size: Any = option(
        None,
        "Side in pixels, or [height, width], of the largest held-out image; null: image_size, with data.fit=crop twice that.",
    )


@dataclass
class ThroughputConfig(TimedConfig):
    """How fast a composition trains and predicts, with its data and without."""

    name: str = "throughput"


@dataclass
class MaxBatchConfig(ModeConfig):
    """The largest micro-batch that trains, found by training with it."""

    name: str = "max_batch"
    budget_gb: float | None = option(None, "GiB that tensors may take; null: what is free.", gt=0)
    margin: float = option(0.1, "Share of it that is kept free.", ge=0, lt=1)
    slowdown: float = option(
        2.0, "On CUDA a batch so many times slower a sample than a smaller one is too large.", gt=1
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
    compile: bool | None = option(None, "Try compile=true, too (minutes); null: on CUDA only.")
    grow: bool = option(False, "Then make model and samples larger while min_speed is kept.")
    min_speed: float = option(0.5, "Share of the composed samples/s that grow keeps.", gt=0)


@dataclass
class LrFindConfig(ModeConfig):
    """The learning rate at which the loss falls fastest."""

    name: str = "lr_find"
    first: float = option(1e-6, "Learning rate of the sweep's first update.", gt=0)
    last: float = option(1.0, "Of its last; it ends earlier where the loss diverges.", gt=0)
    updates: int = option(100, "Updates of a sweep that does not diverge.", ge=10)
    smoothing: float = option(0.9, "Weight of the past in the loss's mean.", ge=0, lt=1)
    divergence: float = option(4.0, "It ends at so many times its smallest mean.", gt=1)


@dataclass
class LadderConfig(TimedConfig):
    """What each step from a plain training loop to everything on brings."""

    name: str = "ladder"
    batch_size: int | None = option(
        None, "The larger micro-batch, halved until it fits; null: four times batch_size.", ge=1
    )
    workers: int | None = option(None, "Data workers; null: by cores, at least one.", ge=0)
    cache: str = option("disk", "Where decoded images are kept.", choices=("ram", "disk"))
    timeout_s: float = option(900.0, "A rung that takes longer, with compiling, is left out.", gt=0)


@dataclass
class LoaderModeConfig(TimedConfig):
    """How fast batches come, and the smallest setting that outruns the model."""

    name: str = "loader"
    workers: list[int] | None = option(None, "Their counts; null: 0, powers of 2, all cores.", ge=0)
    prefetch: list[int] = option([2, 4], "Batches that each worker keeps ready.", ge=1)
    caches: list[str] = option(
        ["none", "disk"], "Where decoded images are kept.", choices=("none", "disk", "ram")
    )
    dali: bool = option(False, "Time NVIDIA DALI, too: pip install -r requirements-dali.txt")


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
    rounds: int = option(5, "Alternating rounds of three steps; shown are medians.", ge=3)


MODES: dict[str, type[ModeConfig]] = {
    kind.name: kind
    for kind in (
        DataModeConfig, DiagnoseConfig, LadderConfig, LoaderModeConfig, LrFindConfig, MaxBatchConfig, MonitorConfig,
        OptimizeConfig, PlanConfig, SegformerModeConfig, ThroughputConfig,
    )
}  # fmt: skip
