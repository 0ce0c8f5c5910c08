"""The schema of benchmark.py: a training's config, and what is measured about it."""

from __future__ import annotations

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from segfit.config import REQUIRED, RunConfig, option


@dataclass
class ModeConfig:
    """What every mode has."""

    name: str = option(REQUIRED, "Which module of segfit.tuning answers.")


@dataclass
class BenchmarkConfig(RunConfig):
    """benchmark.py: the composition that would be trained, and a question about it."""

    benchmark: ModeConfig = REQUIRED
    seconds: float | None = option(
        None, "How long each measurement (monitor: the watch) lasts; null: the mode's own.", gt=0
    )


@dataclass
class MonitorConfig(ModeConfig):
    """Utilisation, memory, temperature and power, once a second."""

    name: str = "monitor"


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
class ThroughputConfig(ModeConfig):
    """How fast a composition trains and predicts, with its data and without."""

    name: str = "throughput"
    warmup: int = option(5, "Steps that are made before anything is timed.", ge=0)


MODES: dict[str, type[ModeConfig]] = {
    "diagnose": DiagnoseConfig,
    "monitor": MonitorConfig,
    "throughput": ThroughputConfig,
}


def register() -> None:
    """Give Hydra the schemas of benchmark.py: names that conf/benchmark.yaml and its group extend."""
    store = ConfigStore.instance()
    store.store(name="benchmark_schema", node=BenchmarkConfig)
    for name, schema in MODES.items():
        store.store(group="benchmark", name=f"{name}_schema", node=schema)
