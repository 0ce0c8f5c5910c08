"""What tasks have in common: a loss whose micro-batches add up, samples that are shown, scores by torchmetrics.

A config may add metrics of torchmetrics to a task's own. It may be that of an untrusted run folder: nothing outside of
torchmetrics is imported, and the task says from which of its packages a metric may come.
"""

from __future__ import annotations

import importlib
import inspect
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.task import Batch, Forward
from segfit.errors import SegFitError, nearest, raise_all

if TYPE_CHECKING:  # its import takes seconds
    from torchmetrics import Metric

State = dict[str, Any]  # of a metric: name → a tensor, or a list of tensors


@dataclass(frozen=True)
class ExtraMetric:
    """A metric that can be made, and what its scores are called."""

    score: str  # its name among the scores
    kind: type[Metric]
    arguments: Mapping[str, Any]  # of the constructor, as given and filled in
    labels: Sequence[str] = ()  # of the entries of a vector, if they are as many
    names: tuple[str, ...] = ()  # `score`, or `score/label` for each entry of a vector or a mapping

    @property
    def mode(self) -> str | None:
        """Whether more ("max") or less ("min") is better; None where torchmetrics does not say."""
        better = self.make().higher_is_better
        return None if better is None else "max" if better else "min"

    def make(self) -> Metric:
        """Return a fresh metric, with a state `left_out`; `merge` adds up several processes, not the metric itself."""
        metric = self.kind(**{**self.arguments, "sync_on_compute": False})
        metric.add_state("left_out", torch.tensor(0), dist_reduce_fx="sum")
        return metric

    def update(self, metric: Metric, *inputs: Tensor) -> None:
        """Update a metric with a sample; one that it refuses is left out and counted."""
        before = state_of(metric)
        try:
            metric.update(*inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            restore(metric, {**before, "left_out": before["left_out"] + 1})

    def compute(self, metric: Metric, samples: int) -> dict[str, float]:
        """Return the scores of so many samples, and how many of them were left out if any; NaN if all were."""
        left_out = float(cast(Tensor, metric.left_out))
        nothing = dict.fromkeys(self.names, float("nan"))
        scores = self.read(metric) if samples > left_out else nothing
        return {**scores, f"{self.score}/left_out": left_out} if left_out else scores

    def read(self, metric: Metric) -> dict[str, float]:
        """Return the scores; raise a ValueError if they are neither a number nor a vector or mapping of numbers."""
        value = metric.compute()
        if isinstance(value, Tensor) and value.ndim == 1 and len(value) > 1:
            labels = self.labels if len(self.labels) == len(value) else range(len(value))
            value = dict(zip(labels, value, strict=True))
        if not isinstance(value, Mapping):
            return {self.score: _number(value)}
        return {f"{self.score}/{label}": _number(entry) for label, entry in value.items()}


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
        """Cut inputs and targets into pieces of at most `size`, as equal as can be: batch norm hates single samples."""
        count = -(-len(inputs) // size)
        return list(zip(inputs.tensor_split(count), targets.tensor_split(count), strict=True))


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
        """Predict and count a batch; if this raises, nothing of it is counted, but the task's callbacks may have been called."""
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


def state_of(metric: Metric) -> State:
    """Return a copy of a metric's state; not of the entries of lists, which no metric changes."""
    return {
        name: list(value) if isinstance(value, list) else value.clone()
        for name, value in metric.metric_state.items()
    }


def restore(metric: Metric, state: State) -> None:
    """Give a metric another state."""
    for name, value in state.items():
        setattr(metric, name, value)


def merge(metric: Metric, states: Sequence[State]) -> None:
    """Give a metric what one or more processes counted, reduced as torchmetrics does it in a process group.

    States of processes that counted nothing may have other shapes, and have to be left away.
    """
    if len(states) < 2:
        restore(metric, states[0] if states else {})
        return
    reductions: Mapping[str, Any] = metric._reductions
    for name, reduce in reductions.items():
        values: list[Any] = [state[name] for state in states]
        if isinstance(values[0], list):
            setattr(metric, name, [entry for value in values for entry in value])
        else:
            setattr(metric, name, (reduce or (lambda stacked: stacked))(torch.stack(values)))


def checked_metrics(
    items: Sequence[Any] | None,
    packages: Sequence[str],
    taken: Sequence[str],
    example: Callable[[ExtraMetric], Sequence[Tensor]],
    filled: Mapping[str, Any] | None = None,
    labels: Sequence[str] = (),
) -> list[ExtraMetric]:
    """Return the metrics that a config names; each has scored an example.

    `items` are dotted names, or mappings of `name`, perhaps `score`, and the constructor's arguments. A metric may come from
    `packages` of torchmetrics. `filled` are arguments for the constructors that take them, where they are not given;
    `example` returns what updates a metric; `labels` are those of a result's entries, if the arguments ask for one a class;
    `taken` are the task's own scores. Raises a SegFitError with every metric that is unknown, cannot be made, or cannot
    score the example.
    """
    found: list[ExtraMetric] = []
    problems: list[str] = []
    for item in items or ():
        arguments = dict(item) if isinstance(item, Mapping) else {"name": item}
        name = arguments.pop("name")
        try:
            kind = _metric_class(name, packages)
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__.replace("IoU", "Iou"))
            score = str(arguments.pop("score", words.lower()))  # mean_iou, multiclass_f1_score
            if score in (*taken, *(one.score for one in found)):
                raise SegFitError(f"there is a score {score} already: give another, score: …")
            takes = inspect.signature(kind).parameters
            arguments = {
                key: value for key, value in (filled or {}).items() if key in takes
            } | arguments
            own = labels[1:] if arguments.get("include_background") is False else labels
            each = arguments.get("per_class") or arguments.get("average", "") in (None, "none")
            extra = ExtraMetric(score, kind, arguments, own if each else ())
            with torch.inference_mode():
                metric = extra.make()
                metric.update(*example(extra))
                found.append(replace(extra, names=tuple(extra.read(metric))))
        except SegFitError as error:
            problems.append(f"metrics.extra: {name}: {error}")
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            problems.append(f"metrics.extra: {name}: cannot score an example ({reason}).")
    raise_all(problems)
    return found


def _metric_class(name: str, packages: Sequence[str]) -> type[Metric]:
    import torchmetrics

    allowed = [f"torchmetrics.{package}" for package in packages]
    module, _, attribute = name.rpartition(".")
    kind = None
    if re.fullmatch(r"torchmetrics(\.\w+)*", module):  # nothing else is imported
        with suppress(ImportError, AttributeError):
            kind = getattr(importlib.import_module(module), attribute)
    if not (
        isinstance(kind, type)
        and issubclass(kind, torchmetrics.Metric)
        and kind.__module__.startswith(tuple(f"{package}." for package in allowed))
    ):
        known = [name for package in allowed for name in importlib.import_module(package).__all__]
        raise SegFitError(f"must be a metric of {', '.join(allowed)}.{nearest(attribute, known)}")
    return kind


def _number(value: Any) -> float:
    tensor = torch.as_tensor(value)
    if tensor.numel() != 1:
        raise ValueError(f"a result of shape {tuple(tensor.shape)} is no score")
    return float(tensor)
