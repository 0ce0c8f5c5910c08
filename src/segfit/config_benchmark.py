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


MODES: dict[str, type[ModeConfig]] = {}


def register() -> None:
    """Give Hydra the schemas of benchmark.py: names that conf/benchmark.yaml and its group extend."""
    store = ConfigStore.instance()
    store.store(name="benchmark_schema", node=BenchmarkConfig)
    for name, schema in MODES.items():
        store.store(group="benchmark", name=f"{name}_schema", node=schema)
