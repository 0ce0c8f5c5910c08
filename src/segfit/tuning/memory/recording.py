"""One update and one validation batch of a config, on tensors without data."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from segfit.assembly.state import make_state
from segfit.assembly.task import assembly_of, planning_of
from segfit.engine.evaluate import evaluate
from segfit.engine.precision import Precision
from segfit.engine.state import TrainingState
from segfit.engine.step import make_update
from segfit.engine.task import Task
from segfit.tuning.change import changed, thawed
from segfit.tuning.memory.curve import PARTS
from segfit.tuning.memory.pretend import Cuts, without_data
from segfit.tuning.memory.recorder import MemoryRecorder


@dataclass(frozen=True)
class Recording:
    """What happened to memory."""

    memory: MemoryRecorder  # its events, from before the model was made
    train: tuple[int, int]  # where in the events an update begins and ends
    passes: list[int]  # where each of its forward passes does; before the first all is prepared
    val: tuple[int, int]  # where a validation batch begins and ends
    batch: int  # samples of a micro-batch
    val_batch: int  # of a validation batch
    accumulate: int  # micro-batches of the update
    parameters: int  # how many numbers the model has

    @cached_property
    def living(self) -> NDArray[np.float64]:
        """The living bytes after each event, by part."""
        changes = np.zeros((len(self.memory.events), len(PARTS)))
        for row, event in enumerate(self.memory.events):
            part = PARTS.index(self.memory.parts.get(abs(event), "activations"))
            changes[row, part] = math.copysign(self.memory.sizes[abs(event)], event)
        return changes.cumsum(0)


class CutTask:
    """A task that cuts the graph behind its loss."""

    def __init__(self, task: Task, cuts: Cuts) -> None:
        self.task = task
        self.cuts = cuts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, outputs: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the task's loss, cut off."""
        return self.cuts.cut(self.task.loss(outputs, targets, totals))


class _Enough(Exception):  # noqa: N818 - not an error
    """A validation has shown what a batch takes."""


def record(
    config: DictConfig, precision: Precision, original: tuple[int, ...], val_batch: int
) -> Recording:
    """Return what an update and a validation batch of a config do to memory.

    The optimizer has its state already: the largest moment of a training is not in its first update.

    Args:
        config: checked; weights are not looked for, and nothing is compiled.
        precision: of forward passes; its device type is the one that is recorded.
        original: size of a held-out sample.
        val_batch: samples of a validation batch, unless the config scores them one by one.
    """
    planning, assembly = planning_of(config), assembly_of(config)
    val_batch = min(val_batch, assembly.held_out_batch_size(config))
    as_recorded = {"compile": False, "resume": None, "init": None, "precision": precision.name}
    config = changed(thawed(planning.costliest(config)), as_recorded)
    recorder, cuts = MemoryRecorder(precision.device_type), Cuts()
    passes: list[int] = []
    with (
        _no_collection(),
        deterministic_algorithms(config.deterministic),
        without_data(recorder, cuts) as device,
    ):
        state, _ = make_state(config, device, precision, 1, lambda _: None)
        # What augmentation takes is measured with data, by `predict`.
        task = planning.without_augmentation(assembly.make_task(config, device))
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        _name_parts(recorder, state)
        inner = state.forward

        def forward(inputs: Tensor) -> Tensor:
            passes.append(len(recorder.events))
            outputs = cuts.cut(inner(inputs))
            passes.append(len(recorder.events))
            return outputs

        state.forward = forward
        state.train()
        gc.collect()
        begun = len(recorder.events)
        window = [planning.train_example(config) for _ in range(config.accumulate)]
        cutting: Any = CutTask(task, cuts)
        make_update(state, cutting, window, range(config.accumulate), config.clip_grad_norm)
        del window
        gc.collect()
        trained = len(recorder.events)

        batch, numbers = planning.held_out_example(config, val_batch, original)
        recorder.scalars = itertools.cycle(numbers)
        ready = len(recorder.events)
        try:
            evaluate(state.evaluated(), task, [batch], state.precision, _enough)
        except _Enough as enough:
            enough.__traceback__ = None  # its frames hold the batch
        del batch
        gc.collect()
        return Recording(
            recorder,
            train=(begun, trained),
            passes=passes,
            val=(ready, len(recorder.events)),
            batch=config.batch_size,
            val_batch=val_batch,
            accumulate=config.accumulate,
            parameters=sum(parameter.numel() for parameter in state.model.parameters()),
        )


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch take the operations that it takes under `deterministic`: some of them are made of others, which take more."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def _enough(_: int) -> None:
    raise _Enough


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Let the garbage collector run where it is called only, and over what was made since only.

    When it runs by itself depends on what else the process did, and it takes long over torch's own objects.
    """
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def _name_parts(recorder: MemoryRecorder, state: TrainingState) -> None:
    recorder.assign([*state.model.parameters(), *state.model.buffers()], "parameters")
    if state.ema is not None:
        recorder.assign([*state.ema.module.parameters(), *state.ema.module.buffers()], "average")
    for values in state.optimizer.state.values():
        recorder.assign(filter(torch.is_tensor, values.values()), "optimizer")

    def name_gradient(parameter: Tensor) -> None:
        recorder.assign([parameter.grad], "gradients")

    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(name_gradient)
