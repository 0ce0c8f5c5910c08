"""What a config takes, from recordings of its own update and validation: each block is affine in the batch."""

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from segfit.assembly.state import make_state
from segfit.assembly.task import assembly_of, planning_of, sample_bytes
from segfit.engine.evaluate import evaluate
from segfit.engine.precision import Precision
from segfit.engine.state import TrainingState
from segfit.engine.step import make_update
from segfit.tuning.change import changed, thawed
from segfit.tuning.memory.planner import PARTS, RECORDED, Curve, Forecast
from segfit.tuning.memory.pretend import without_data
from segfit.tuning.memory.recorder import MemoryRecorder

# Where the peak is looked for; between two of these batch sizes the peak does not move by much.
_BATCHES = np.unique(np.concatenate([np.arange(1, 129), np.geomspace(128, 1e6, 80).astype(int)]))
BATCHES = (12, 16)  # large enough that models take the way that they take for many pixels
VAL_BATCHES = (4, 6)  # more would only take longer


@dataclass(frozen=True)
class Recording:
    """What happened to memory."""

    events: list[int]  # of the recorder, from before the model was made
    living: NDArray[np.float64]  # bytes after each event, (events, PARTS)
    # Where in the events an update begins, each of its forward passes begins and ends, and the update ends; before the
    # first pass all is prepared.
    marks: list[int]
    val: int  # where a validation batch begins
    batch: int  # samples of a micro-batch
    val_batch: int  # of a validation batch
    parameters: int  # how many numbers the model has


def predict(
    config: DictConfig, device_type: str, precision: str, original: tuple[int, ...]
) -> Forecast:
    """Return the memory of training and validation at any micro-batch; nothing is downloaded, no device is needed.

    The batch_size of the checked config does not matter, nor by how much accumulate is above 2: see
    `Forecast.accumulating`. Types and kernels are chosen by the rules of "cuda" or "cpu"; precision is "fp32", "bf16" or
    "fp16", `original` the (height, width) of the largest held-out image. Raise a SegFitError if the model cannot be made.
    """
    config = changed(config, {"accumulate": min(config.accumulate, RECORDED)})
    planning, mode = planning_of(config), Precision(precision, device_type)
    small, large = (
        record(changed(config, {"batch_size": batch}), mode, original, val_batch)
        for batch, val_batch in zip(BATCHES, VAL_BATCHES, strict=True)
    )
    result = forecast(small, large)
    train, (fixed, each) = result.train, result.waiting
    augmentation = planning.device_augmentation(config)
    if augmentation is not None:
        now = peak_bytes(augmentation[0]) * augmentation[1]
        idle = Curve([[small.living[small.marks[0] - 1].tolist(), [0.0] * len(PARTS)]])
        more = idle.plus(config.accumulate * fixed, config.accumulate * each + now)
        train = Curve(train.moments + more.moments)
    # On a card the next window's samples are copied ahead.
    ahead = sample_bytes(config) if device_type == "cuda" else 0
    train = train.plus(0, config.accumulate * ahead)
    return replace(result, train=train, waiting=[fixed, each + ahead])


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return the bytes that a function takes at its peak, results included; it runs on the CPU, with data."""
    with MemoryRecorder("cpu") as recorder:
        work()
    return int(recorder.living().sum(1).max(initial=0))


def forecast(first: Recording, second: Recording) -> Forecast:
    """Return the memory of all batch sizes from recordings at two.

    A model may take another way for few pixels than for many, or go piece by piece: its moments then have no
    counterparts, but each forward pass does, and what lies between two. So the peak of each stretch counts. The second recording is of the same config at a larger batch size.
    """
    recordings = first, second
    # Held-out images are scored in groups, so the operations of a validation do depend on the batch.
    peaks = [_largest(recording.living[recording.val :]) for recording in recordings]
    val = _line(peaks, first.val_batch, second.val_batch)
    if np.array_equal(_in_order(first), _in_order(second)):
        living = [one.living[one.marks[0] : one.marks[-1]] for one in recordings]
        train = _line(living, first.batch, second.batch)
        totals = train[:, 0].sum(1) + _BATCHES[:, None] * train[:, 1].sum(1)
        train = train[np.unique(totals.argmax(1))]  # what is the peak at some batch size
    else:
        peaks = [
            np.stack(
                [_largest(one.living[begin:end]) for begin, end in itertools.pairwise(one.marks)]
            )
            for one in recordings
        ]
        train = _line(peaks, first.batch, second.batch)
    passes = len(first.marks) // 2 - 1
    ready = [np.diff(one.living.sum(1)[np.array(one.marks[:2]) - 1]) / passes for one in recordings]
    return Forecast(
        Curve(train.tolist()),
        Curve([val.tolist()]),
        first.parameters,
        waiting=_line(ready, first.batch, second.batch).ravel().tolist(),
        recorded=passes,
        fixed_val=first.val_batch == second.val_batch,
    )


def _line(values: Sequence[NDArray[np.float64]], first: int, second: int) -> NDArray[np.float64]:
    """Return what is fixed and what each sample adds, (…, 2, N), from values (…, N) at two batch sizes."""
    each = (values[1] - values[0]) / ((second - first) or 1)
    return np.stack([values[0] - each * first, each], -2)


def _largest(living: NDArray[np.float64]) -> NDArray[np.float64]:
    return living[living.sum(1).argmax()]  # type: ignore[no-any-return]


def _in_order(recording: Recording) -> NDArray[np.int64]:
    """Return the events up to the end of the update; what dies together dies in order of age."""
    events = np.array(recording.events[: recording.marks[-1]])
    return events[np.lexsort((events, events < 0, (events > 0).cumsum()))]


class _Enough(Exception):  # noqa: N818 - not an error
    """Ends a validation that has shown what a batch takes."""


def record(
    config: DictConfig, precision: Precision, original: tuple[int, ...], val_batch: int
) -> Recording:
    """Return what an update and a validation batch of a config do to memory.

    The optimizer has its state already: the largest moment of a training is not in its first update. Weights are not
    looked for, and nothing is compiled. Recorded is the device type of `precision`; `original` is the size of a held-out
    sample, `val_batch` the samples of a validation batch, unless the config scores them one by one.
    """
    planning, assembly = planning_of(config), assembly_of(config)
    val_batch = min(val_batch, assembly.held_out_batch_size(config))
    as_recorded = {"compile": False, "resume": None, "init": None, "precision": precision.name}
    config = changed(thawed(planning.costliest(config)), as_recorded)
    recorder, marks = MemoryRecorder(precision.device_type), list[int]()
    with undisturbed(config.deterministic), without_data(recorder) as (device, rules):
        state, _ = make_state(config, device, precision, 1, lambda _: None)
        # What augmentation takes is measured with data, by `predict`.
        task = planning.without_augmentation(assembly.make_task(config, device))
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        _name_parts(recorder, state)
        inner = rules.cutting(state.forward)

        def forward(inputs: Tensor) -> Tensor:
            marks.append(len(recorder.events))
            outputs = inner(inputs)
            marks.append(len(recorder.events))
            return outputs

        state.forward = forward
        state.train()
        gc.collect()
        marks.append(len(recorder.events))
        window = [planning.train_example(config) for _ in range(config.accumulate)]
        with mock.patch.object(type(task), "loss", rules.cutting(type(task).loss)):
            make_update(state, task, window, range(config.accumulate), config.clip_grad_norm)
        del window
        gc.collect()
        marks.append(len(recorder.events))

        batch, numbers = planning.held_out_example(config, val_batch, original)
        recorder.scalars = itertools.cycle(numbers)
        val = len(recorder.events)
        with contextlib.suppress(_Enough):
            evaluate(
                state.evaluated(), task, [batch], state.precision, mock.Mock(side_effect=_Enough)
            )
        del batch
        gc.collect()
        parameters = sum(parameter.numel() for parameter in state.model.parameters())
    living = recorder.living()
    return Recording(recorder.events, living, marks, val, config.batch_size, val_batch, parameters)


@contextlib.contextmanager
def undisturbed(deterministic: bool) -> Iterator[None]:
    """Collect garbage only where that is asked for, of what was made since; take operations as under `deterministic`.

    When the collector runs by itself depends on what else the process did, and it takes long over torch's own objects.
    Some deterministic operations are made of others, which take more.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    gc.disable()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()
        torch.use_deterministic_algorithms(before, warn_only=True)


def _name_parts(recorder: MemoryRecorder, state: TrainingState) -> None:
    recorder.note([*state.model.parameters(), *state.model.buffers()], "parameters")
    if state.ema is not None:
        recorder.note([*state.ema.module.parameters(), *state.ema.module.buffers()], "average")
    for values in state.optimizer.state.values():
        recorder.note(filter(torch.is_tensor, values.values()), "optimizer")

    def name_gradient(parameter: Tensor) -> None:
        recorder.note(filter(torch.is_tensor, [parameter.grad]), "gradients")

    for parameter in state.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(name_gradient)
