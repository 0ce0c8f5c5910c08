"""What the loop needs to know about the work, and all it knows."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from segfit.engine.findings import Findings

Batch = dict[str, Tensor]
Forward = Callable[[Tensor], Tensor]


def count_samples(batch: Batch) -> int:
    """Return the number of samples of a batch: the first dimension of each of its tensors."""
    return len(next(iter(batch.values())))


def device_of(batch: Batch) -> torch.device:
    """Return where a batch lies."""
    return next(iter(batch.values())).device


class Meter(Protocol):
    """Collects the scores of one pass over held-out data, on the device."""

    def update(self, forward: Forward, batch: Batch) -> None:
        """Predict a batch and count it; if it raises, nothing of the batch is counted."""

    def result(self) -> Findings:
        """Read the device and return the scores."""


class Task(Protocol):
    """What a batch means."""

    def prepare(self, batch: Batch, seed: int) -> tuple[Tensor, Any]:
        """Return the model's input and the targets of a training batch that lies on the device.

        Augments and normalises; `seed` alone decides what is drawn.
        """

    def totals(self, targets: Any) -> Tensor:
        """Return what each of the loss's K terms is divided by, (K,) float32."""

    def loss(self, outputs: Tensor, targets: Any, totals: Tensor) -> Tensor:
        """Return this micro-batch's share of the loss, (): its sums over the window's `totals`."""

    def split(self, inputs: Tensor, targets: Any, size: int) -> list[tuple[Tensor, Any]]:
        """Cut a prepared micro-batch into pieces of at most `size` samples."""

    def meter(self) -> Meter:
        """Return a fresh collector of scores."""


class TrainingData(Protocol):
    """Training batches by epoch; what comes is a function of (epoch, position) alone.

    Positions count the samples of all processes, so that a run can go on with batches of another size.
    """

    def batches_per_epoch(self) -> int:
        """Return the number of micro-batches an epoch."""

    def batches_left(self, sample: int) -> int:
        """Return the number of micro-batches that an epoch has from its `sample`th sample on; 0 or less: it is over."""

    def epoch(self, epoch: int, start_sample: int) -> Iterable[Batch]:
        """Yield the batches of an epoch on the device, from its `start_sample`th sample on."""

    def names(self, batch: Batch) -> list[str]:
        """Return a name of each sample of a batch, for messages; may read the device."""
