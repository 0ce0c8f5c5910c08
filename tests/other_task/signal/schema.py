from __future__ import annotations

from dataclasses import dataclass

from segfit.config.schema import DataConfig, EvaluateConfig, ModelConfig, RunConfig, option

UNIT = "signal"
MONITORS = {"mse": "min", "loss": "min"}
COLUMNS = {"mse": "MSE"}
MEMORY_OPTIONS = ()
MEMORY_ADVICE = "Lower length."


@dataclass
class TinyConfig(ModelConfig):
    name: str = "tiny"
    channels: int = option(8, "Of the two hidden layers.", ge=1)


@dataclass
class WavesConfig(DataConfig):
    name: str = "waves"
    train_size: int = option(64, "Signals to train on.", ge=1)
    val_size: int = option(16, "Held-out signals.", ge=1)
    noise: float = option(0.3, "Standard deviation of what is to be removed.", ge=0)


@dataclass
class Run(RunConfig):
    length: int = option(64, "Numbers of a signal.", ge=8)
    monitor: str = option("mse", "Score that picks the best checkpoint.", choices=tuple(MONITORS))


Evaluate = EvaluateConfig
GROUPS = {"model": {"tiny": TinyConfig}, "data": {"waves": WavesConfig}}


def problems(config):
    if config.length % 2:
        yield f"length={config.length}: must be even."


def sample_label(config):
    return f"{config.length} numbers"


def held_out_shape(config):
    return (config.length,)
