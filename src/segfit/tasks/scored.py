"""What tasks have in common: a loss whose micro-batches add up, scores by torchmetrics, and samples that are shown."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.extra_metrics import ExtraMetric, merge, restore, state_of
from segfit.engine.task import Batch, Forward

if TYPE_CHECKING:  # its import takes seconds
    from torchmetrics import Metric


@dataclass(frozen=True, kw_only=True)
class ScoredTask:
    """The part of a `Task` that does not depend on what a batch is."""

    criterion: Any  # (outputs, targets, totals) → the loss; has `totals`; on the batches' device
    # held-out samples to show, index → name
    panels: Mapping[int, str] = field(default_factory=dict)
    distributed: Distributed = SINGLE_PROCESS  # the processes whose samples make up the scores
    extra: Sequence[ExtraMetric] = ()  # metrics whose results join the scores

    def totals(self, targets: Tensor) -> Tensor:
        """Return the denominators of the loss's K terms, (K,) float32."""
        totals: Tensor = self.criterion.totals(targets)
        return totals

    def loss(self, outputs: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the loss (); sums run in fp32 whatever the forward pass ran in."""
        value: Tensor = self.criterion(outputs, targets, totals)
        return value

    def split(self, inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Cut inputs and targets into pieces of at most `size` samples."""
        return list(zip(inputs.split(size), targets.split(size), strict=True))


class ScoredMeter:
    """A `Meter` of the metrics of a task; a subclass says how a batch is counted, and what is made of the results."""

    def __init__(self, task: ScoredTask, metrics: Metric) -> None:
        self.task: Any = task
        self.metrics: Any = metrics
        self.extra = [extra.make() for extra in task.extra]
        self.all_metrics = (metrics, *self.extra)
        self.losses = torch.zeros(())  # (2,) once something was counted: their sum, and of how many
        self.updates = 0  # of the extra metrics
        self.panels: dict[int, Any] = {}  # index → what is shown of a sample

    def update(self, forward: Forward, batch: Batch) -> None:
        """Predict and count a batch.

        If it raises, nothing of the batch is counted; callbacks of the task may have been called.
        """
        losses, updates = self.losses, self.updates
        states = [state_of(metric) for metric in self.all_metrics]
        try:
            self.count(forward, batch)
        except Exception:
            self.losses, self.updates = losses, updates
            for metric, state in zip(self.all_metrics, states, strict=True):
                restore(metric, state)
            raise

    @abstractmethod
    def count(self, forward: Forward, batch: Batch) -> None:
        """Predict and count a batch."""

    def add_loss(self, loss: Tensor, weight: float) -> None:
        """Add a mean loss () of so many samples."""
        self.losses = self.losses + torch.stack([loss * weight, loss.new_full((), weight)])

    def update_extra(self, *inputs: Tensor) -> None:
        """Update the extra metrics on the device of the inputs; synchronises, once a pass."""
        for extra, metric in zip(self.task.extra, self.extra, strict=True):
            extra.update(metric.to(inputs[0].device), *inputs)
        self.updates += 1

    def merged(self) -> tuple[float, dict[str, float], list[Any]]:
        """Give this meter what all processes counted, each of which has to call; synchronises.

        Returns the mean of the losses, NaN without any; the scores of the extra metrics; the panels in the order of their
        samples.
        """
        own = [state_of(metric.cpu()) for metric in self.all_metrics]
        losses = self.losses.expand(2).tolist()
        every = self.task.distributed.gather((own, losses, self.updates, self.panels))
        counted = [states for states, _, updates, _ in every if updates]
        for metric, *states in zip(self.all_metrics, *counted, strict=True):
            merge(metric, states)
        self.updates = sum(updates for _, _, updates, _ in every)
        loss, weight = (sum(parts) for parts in zip(*(one[1] for one in every), strict=True))
        added: dict[str, float] = {}
        for extra, metric in zip(self.task.extra, self.extra, strict=True):
            added |= extra.compute(metric, self.updates)
        panels = {index: panel for *_, kept in every for index, panel in kept.items()}
        mean = loss / weight if weight else float("nan")
        return mean, added, [panels[index] for index in sorted(panels)]
