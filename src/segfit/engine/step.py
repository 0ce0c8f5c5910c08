"""One update: forward, backward and step over an accumulation window."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segfit.engine.non_finite import NotFinite, describe
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.state import TrainingState
from segfit.engine.task import Batch, Task, count_samples
from segfit.errors import SegFitError
from segfit.system.phases import phase


class PartlyUpdated(Exception):  # noqa: N818 - told by its cause
    """Memory ran out while gradients, weights or their averages were changed: some of them were, some were not."""


class PeerFailed(Exception):  # noqa: N818 - the other process tells the error
    """Another process of this training failed in this update."""


def make_update(
    state: TrainingState,
    task: Task,
    window: Sequence[Batch],
    seeds: Sequence[int],
    clip_grad_norm: float | None,
    *,
    watched: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make one optimizer update from the micro-batches of `window`.

    The loss is normalised over the whole window of all processes, so that the update equals that of one big batch.
    Nothing here waits for the device, but for the scaler in fp16 when the optimizer is not a fused one, and where the
    update is watched.

    Args:
        state: what is trained; its progress.update counts this update afterwards.
        task: what a batch means.
        window: micro-batches on the device.
        seeds: one a micro-batch, for its augmentation.
        clip_grad_norm: largest norm of the gradient, or None.
        watched: look at loss and gradient before the weights move.

    Returns:
        This process's share of the window's loss and the gradient's norm before clipping, both () on the device.

    Raises:
        NotFinite: if the update is watched and its loss or gradient is not finite; nothing moved.
        PartlyUpdated: if memory ran out after the backward pass; the weights are not to be used any more.
        PeerFailed: if another process failed.
        SegFitError: if memory runs out before the forward pass, where smaller micro-batches do not help.
        Exception: of the forward or backward pass; gradients are cleared. If it is_out_of_memory, the same window may
            be tried again, and every process of the world got such an error.
    """
    with phase("augmentation"), _told_what_takes_it(window), all_or_none(state):
        prepared = [task.prepare(batch, seed) for batch, seed in zip(window, seeds, strict=True)]
        totals = torch.stack([task.totals(targets) for _, targets in prepared]).sum(0)
    totals = state.world.sum(totals)
    if state.progress.micro_batch:
        size = state.progress.micro_batch
        prepared = [piece for pair in prepared for piece in task.split(*pair, size)]

    try:
        loss = _accumulate(state, task, prepared, totals)
    except Exception:
        # The next try must not add to half a gradient.
        state.optimizer.zero_grad(set_to_none=True)
        raise

    with phase("optimizer"):
        with _moving(state):
            state.scaler.unscale_(state.optimizer)  # so that clipping sees the true gradients
            norm = clip_gradients(state.model, clip_grad_norm)
        if watched:
            _refuse_if_not_finite(state, loss, norm)
        with _moving(state):
            state.scaler.step(state.optimizer)  # skips the update if a gradient overflowed in fp16
            state.scaler.update()  # after step: it looks at what step found
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.update(state.model, step=state.progress.update + 1)
        count_update(state)
    state.proven = True
    return loss, norm


@contextmanager
def all_or_none(state: TrainingState) -> Iterator[None]:
    """Let a failure in here be every process's, so that none waits in vain for the others' gradients.

    Raises:
        MemoryError: if another process ran out of memory.
        PeerFailed: if another process failed otherwise.
    """
    try:
        yield
    except Exception as error:
        state.world.max(1 if is_out_of_memory(error) else 2)
        raise
    (worst,) = state.world.max(0)
    if worst == 1:
        raise MemoryError("another process of this training ran out of memory")
    if worst == 2:
        raise PeerFailed


@contextmanager
def _told_what_takes_it(window: Sequence[Batch]) -> Iterator[None]:
    """Tell memory that augmentation lacks: whole batches go through it, however small the micro-batch.

    Raises:
        SegFitError: if so.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        said = str(error).partition("\n")[0]
        raise SegFitError(
            f"out of memory before the forward pass, with {len(window)} × {count_samples(window[0])} samples to augment "
            f"on the device. Lower batch_size or accumulate, or take augmentation=cpu. The error was: {said}"
        ) from None


def _accumulate(
    state: TrainingState, task: Task, prepared: Sequence[tuple[Tensor, Any]], totals: Tensor
) -> Tensor:
    """Leave the gradient of all micro-batches of all processes in the parameters; return this process's loss, ().

    DistributedDataParallel adds gradients up during the last backward, where a process that runs out of memory leaves
    the others waiting. So the first update, which shows whether there is enough, adds them up afterwards.
    """
    loss = torch.zeros((), device=state.device)
    by_hand = state.world.size > 1 and not state.proven
    with all_or_none(state):
        with state.world.no_sync(state.forward):
            for piece in prepared if by_hand else prepared[:-1]:
                part = _forward(state, task, piece, totals)
                _backward(state, part)
                loss += part.detach()
        if not by_hand:
            part = _forward(state, task, prepared[-1], totals)
    with _not_repeatable(state):
        if by_hand:
            state.world.average_gradients(state.model)
        else:
            _backward(state, part)  # adds up the gradients of all processes
            loss += part.detach()
    return loss


def _forward(state: TrainingState, task: Task, piece: tuple[Tensor, Any], totals: Tensor) -> Tensor:
    inputs, targets = piece
    with phase("forward"):
        with state.precision.autocast():
            outputs = state.forward(inputs)
        return task.loss(outputs, targets, totals)


def _backward(state: TrainingState, part: Tensor) -> None:
    with phase("backward"):
        if state.world.size > 1:
            part = part * state.world.size  # the mean over processes that is taken becomes the sum
        state.scaler.scale(part).backward()  # fp16 gradients would underflow; else a no-op


def _refuse_if_not_finite(state: TrainingState, loss: Tensor, norm: Tensor) -> None:
    total = state.world.sum(loss.clone())
    found = describe(float(total), float(norm), scale_of(state))  # synchronises
    if found is not None:
        reset_scaler(state)
        state.optimizer.zero_grad(set_to_none=True)
        raise NotFinite(found)


@contextmanager
def _not_repeatable(state: TrainingState) -> Iterator[None]:
    """End where one of several processes runs out of memory alone, while the others already rely on it.

    Raises:
        SegFitError: if that happened.
    """
    try:
        yield
    except Exception as error:
        if state.world.size == 1 or not is_out_of_memory(error):
            raise
        raise SegFitError(
            f"process {state.world.rank} of {state.world.size} ran out of memory where all of them have to go on "
            f"together. Resume the run with half the batch_size and twice the accumulate."
        ) from error


@contextmanager
def _moving(state: TrainingState) -> Iterator[None]:
    """Tell memory that runs out from here on, where gradients, weights and averages change in place.

    Raises:
        PartlyUpdated: if that happened, in every process.
    """
    try:
        with _not_repeatable(state) if state.proven else all_or_none(state):
            yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reset_scaler(state)
        state.optimizer.zero_grad(set_to_none=True)
        raise PartlyUpdated(str(error).partition("\n")[0]) from None


def count_update(state: TrainingState) -> None:
    """Count an update, made or left out, and set the learning rates for the next."""
    state.progress.update += 1
    state.scheduler.step_update(state.progress.update + state.schedule_offset)


def scale_of(state: TrainingState) -> float:
    """Return the scale of the loss in force, 1.0 outside fp16; synchronises in fp16."""
    return state.scaler.get_scale() if state.scaler.is_enabled() else 1.0


def reset_scaler(state: TrainingState) -> None:
    """Let the scaler forget an update that was unscaled but is not to be made; its scale stays."""
    if state.scaler.is_enabled():
        state.scaler.update(state.scaler.get_scale())


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale all gradients so that their common norm is `largest` at most; return the norm before, ().

    Args:
        model: its parameters' gradients are scaled.
        largest: None leaves them as they are, and saves a pass over them.
    """
    parameters = list(model.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if largest is not None:
        clip_grads_with_norm_(parameters, largest, norm)
    return norm


def halve_micro_batch(state: TrainingState, largest: int, said: str = "") -> str:
    """Lower the number of samples a forward pass may take, after the device ran out of memory.

    Args:
        state: its progress.micro_batch is halved; call it outside of the `except` block, so that the failed
            pass's tensors are no longer held by the traceback.
        largest: samples of the largest micro-batch as it comes from the data.
        said: the error's words, for the case that it was none of memory.

    Returns:
        A line for the person.

    Raises:
        SegFitError: if a single sample does not fit.
    """
    now = min(state.progress.micro_batch or largest, largest)
    if now <= 1:
        raise SegFitError(
            "out of memory with a micro-batch of a single sample. Lower image_size, choose a smaller model, "
            "or set model.checkpointing=true (SegFormer)."
            + (f" The error was: {said}" if said else "")
        )
    state.progress.micro_batch = now // 2
    release_memory(state.device)
    return (
        f"out of memory with a micro-batch of {now}: going on with {now // 2} and more accumulation; "
        f"the effective batch stays. Next time: batch_size={now // 2}, and raise accumulate by as much."
    )
