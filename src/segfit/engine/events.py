"""The events of a training, and who may listen.

The loop calls `step` after every update, with nothing that lives on the device; whatever has to be read from the
device comes in `log` and `epoch`, which are called seldom.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

from segfit.engine.findings import Findings


@dataclass(frozen=True)
class RunInfo:
    """What is about to run.

    Args:
        epochs: epochs in all.
        updates_per_epoch: optimizer updates an epoch.
        start_epoch: first epoch that runs now (> 0 after resuming).
        start_update: updates that were made before (> 0 after resuming).
        total_updates: updates after which training ends at the latest.
        facts: label → text of what really runs: device, precision, weights, parameters, batch, …
        unit: what a sample is called in "img/s".
        columns: score name → label, for the scores that are shown, in their order.
    """

    epochs: int
    updates_per_epoch: int
    start_epoch: int
    start_update: int
    total_updates: int
    facts: Mapping[str, str]
    unit: str = "sample"
    columns: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepLog:
    """Means since the last log.

    Args:
        epoch: 0-based.
        update: updates made so far, over all epochs.
        loss: mean training loss.
        lr: learning rate of the first parameter group.
        grad_norm: mean norm of the gradient before clipping.
        loss_scale: GradScaler's scale; 1.0 where there is none.
        skipped: updates that GradScaler skipped, since a gradient overflowed in fp16.
        samples_per_second: training samples by wall-clock.
        data_wait: share (0-1) of the wall-clock time that the loop waited for data.
        memory_gib: peak memory: CUDA allocator's, or the process's resident set on the CPU.
    """

    epoch: int
    update: int
    loss: float
    lr: float
    grad_norm: float
    loss_scale: float
    samples_per_second: float
    data_wait: float
    memory_gib: float
    skipped: int = 0


@dataclass(frozen=True)
class EpochLog:
    """One finished epoch; `result` is None where no validation was due."""

    epoch: int
    update: int
    loss: float
    lr: float
    samples_per_second: float
    data_wait: float
    memory_gib: float
    seconds: float
    result: Findings | None
    is_best: bool


@dataclass(frozen=True)
class EndLog:
    """How the training ended.

    Args:
        reason: "finished", "max_steps", "patience", "interrupted" (Ctrl-C) or "terminated" (SIGTERM).
        updates: updates made, over all sessions of the run.
        best_scores: `Findings.scores` of the best validation; empty if there was none.
        best_epoch: 0-based epoch of it, or None.
        seconds: wall-clock time of this session.
    """

    reason: str
    updates: int
    best_scores: dict[str, float]
    best_epoch: int | None
    seconds: float


class Listener:
    """Gets the events of a training. Each method does nothing here; every one is called on the main thread."""

    def start(self, info: RunInfo) -> None:
        """Training is about to start."""

    def notice(self, message: str) -> None:
        """Something that the user should know (a fall-back, a skipped step), once."""

    def step(self, epoch: int, update: int) -> None:
        """An update was made; cheap, called every time."""

    def log(self, log: StepLog) -> None:
        """Numbers were read from the device."""

    def validating(self, done: int, total: int) -> None:
        """Validation goes on: `done` of `total` batches."""

    def epoch(self, log: EpochLog) -> None:
        """An epoch is over."""

    def end(self, log: EndLog) -> None:
        """Training is over, whatever the reason."""

    def close(self) -> None:
        """Close terminal and files, also after an exception; may be called again."""


class Listeners(Listener):
    """Passes every event on to several listeners."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners
        for event in vars(Listener):
            if not event.startswith("_"):
                setattr(self, event, partial(self._pass_on, event))

    def _pass_on(self, event: str, *args: object) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*args)
