"""How to train."""

from dataclasses import dataclass


@dataclass(frozen=True)
class FitOptions:
    """How to train; every field but `monitor_mode` is the config's option of the same name."""

    epochs: int
    monitor: str
    monitor_mode: str = "max"  # more of the monitored score is better; "min": less is
    accumulate: int = 1
    seed: int = 0
    clip_grad_norm: float | None = None
    val_every: int = 1
    patience: int | None = None
    max_steps: int | None = None
    max_left_out: int = 5
    log_every: int = 20
    every_minutes: float | None = None
    every_steps: int | None = None
