"""What the training loop is given: a task, its data, and how to train."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from segfit.engine.findings import Findings

Batch = dict[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def count_samples(batch: Batch) -> int:
    """Return the number of samples of a batch: the first dimension of each of its tensors."""
    return len(next(iter(batch.values())))


class Meter(Protocol):
    """Collects the scores of one pass over held-out data, on the device."""

    def update(self, forward: Forward, batch: Batch) -> None:
        """Predict and count a batch; if this raises, nothing of the batch is counted."""

    def result(self) -> Findings:
        """Return the scores; synchronises."""


class Task(Protocol):
    """What a batch means."""

    @property
    def memory_advice(self) -> str:
        """Sentences that say what to change if a single sample does not fit into memory."""

    def prepare(self, batch: Batch, seed: int) -> tuple[Tensor, Any]:
        """Return the model's input and the targets of a training batch on the device.

        Augments and normalises; all that is random depends on `seed` alone.
        """

    def totals(self, targets: Any) -> Tensor:
        """Return what each of the loss's K terms is divided by, (K,) float32."""

    def loss(self, outputs: Tensor, targets: Any, totals: Tensor) -> Tensor:
        """Return this micro-batch's share of the update's loss, (): its sums divided by the update's `totals`."""

    def split(self, inputs: Tensor, targets: Any, size: int) -> list[tuple[Tensor, Any]]:
        """Cut a prepared micro-batch into pieces of at most `size` samples."""

    def meter(self) -> Meter:
        """Return a fresh collector of scores."""


class TrainingData(Protocol):
    """Training batches by epoch, each a function of (epoch, position) alone.

    Positions count the samples of all processes, so that a run can be resumed with another batch size.
    """

    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches per epoch."""

    def batches_left(self, sample: int) -> int:
        """Return the number of micro-batches from an epoch's `sample`th sample on; 0 or less if it is over."""

    def epoch(self, epoch: int, start_sample: int) -> Iterable[Batch]:
        """Yield the batches of an epoch on the device, from its `start_sample`th sample on."""

    def names(self, batch: Batch) -> list[str]:
        """Return a name for each sample of a batch, for messages; may synchronise."""


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
