"""The events of a training, and who may listen.

The loop calls `step` after every update, with nothing that lives on the device; whatever has to be read from the
device comes in `log` and `epoch`, which are called seldom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from segfit.engine.findings import Findings

# torch takes seconds to import, and benchmark.py needs none where it knows the answer
if TYPE_CHECKING:
    from segfit.engine.task import Batch


@dataclass(frozen=True)
class RunInfo:
    """What is about to run."""

    epochs: int  # in all
    updates_per_epoch: int
    start_epoch: int  # first epoch that runs now (> 0 after resuming)
    start_update: int  # updates that were made before (> 0 after resuming)
    total_updates: int  # after which training ends at the latest
    facts: Mapping[str, str]  # label → text of what really runs: device, precision, batch, …
    unit: str = "sample"  # what a sample is called in "img/s"
    columns: Mapping[str, str] = field(default_factory=dict)  # score → label, in the order shown


@dataclass(frozen=True)
class Log:
    """What a log of some updates and one of an epoch have in common; means over the updates."""

    epoch: int  # 0-based
    update: int  # updates made so far, over all epochs
    loss: float
    lr: float  # of the first parameter group
    samples_per_second: float  # by wall-clock
    data_wait: float  # share (0-1) of the wall-clock time that the loop waited for data
    memory_gib: float  # peak: of CUDA's allocator, or of the process's resident set on the CPU


@dataclass(frozen=True)
class StepLog(Log):
    """What happened since the last log."""

    grad_norm: float  # before clipping
    loss_scale: float  # GradScaler's; 1.0 where there is none
    skipped: int = 0  # updates that GradScaler skipped, since a gradient overflowed in fp16


@dataclass(frozen=True)
class EpochLog(Log):
    """One finished epoch; `result` is None where no validation was due."""

    seconds: float
    result: Findings | None
    is_best: bool


@dataclass(frozen=True)
class EndLog:
    """How the training ended."""

    reason: str  # finished, max_steps, patience, interrupted (Ctrl-C) or terminated (SIGTERM)
    updates: int  # over all sessions of the run
    best_scores: dict[str, float]  # of the best validation; empty if there was none
    best_epoch: int | None  # 0-based
    seconds: float  # wall-clock time of this session


class Listener:
    """Gets the events of a training. Each method does nothing here; every one is called on the main thread."""

    def start(self, info: RunInfo) -> None:
        """Training is about to start."""

    def notice(self, message: str) -> None:
        """Something that the user should know (a fall-back, a skipped step), once."""

    def step(self, epoch: int, update: int) -> None:
        """An update was made; cheap, called every time."""

    def began(self, batch: Batch, seed: int) -> None:
        """The first update of a new run was made, of a batch that `task.prepare(batch, seed)` makes again."""

    def log(self, log: StepLog) -> None:
        """Numbers were read from the device."""

    def validating(self, done: int, total: int) -> None:
        """`done` of `total` validation batches are done."""

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
