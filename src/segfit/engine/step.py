"""One update: forward, backward and step over an accumulation window."""

import gc
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segfit.engine.state import TrainingState
from segfit.engine.task import Batch, Task
from segfit.errors import SegFitError
from segfit.phases import phase


def make_update(
    state: TrainingState,
    task: Task,
    window: Sequence[Batch],
    seeds: Sequence[int],
    clip_grad_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """Make one optimizer update from the micro-batches of `window`.

    The loss is normalised over the whole window, so that the update equals that of one big batch. Nothing here
    waits for the device, but for the scaler in fp16 when the optimizer is not a fused one.

    Args:
        state: what is trained; its progress.update counts this update afterwards.
        task: what a batch means.
        window: micro-batches on the device.
        seeds: one a micro-batch, for its augmentation.
        clip_grad_norm: largest norm of the gradient, or None.

    Returns:
        The window's loss and the gradient's norm before clipping, both () on the device.

    Raises:
        Exception: of the forward or backward pass; gradients are cleared. If it is_out_of_memory, the same window may
            be tried again.
    """
    with phase("augmentation"):
        prepared = [task.prepare(batch, seed) for batch, seed in zip(window, seeds, strict=True)]
        totals = torch.stack([task.totals(targets) for _, targets in prepared]).sum(0)
    if state.progress.micro_batch:
        size = state.progress.micro_batch
        prepared = [piece for pair in prepared for piece in task.split(*pair, size)]

    loss = torch.zeros((), device=state.device)
    try:
        for inputs, targets in prepared:
            with phase("forward"):
                with state.precision.autocast():
                    outputs = state.forward(inputs)
                part = task.loss(outputs, targets, totals)
            with phase("backward"):
                state.scaler.scale(part).backward()  # fp16 gradients would underflow; else a no-op
            loss += part.detach()
    except Exception:
        # The next try must not add to half a gradient.
        state.optimizer.zero_grad(set_to_none=True)
        raise

    with phase("optimizer"):
        state.scaler.unscale_(state.optimizer)  # before clipping, which must see the true gradients
        norm = clip_gradients(state.model, clip_grad_norm)
        state.scaler.step(state.optimizer)  # skips the update if a gradient overflowed in fp16
        state.scaler.update()  # after step: it looks at what step found
        state.optimizer.zero_grad(set_to_none=True)

        state.progress.update += 1
        state.scheduler.step_update(state.progress.update)
        if state.ema is not None:
            state.ema.update(state.model, step=state.progress.update)
    return loss, norm


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
            "out of memory with a micro-batch of a single image. Lower image_size, choose a smaller model, "
            "or set model.checkpointing=true (SegFormer)."
            + (f" The error was: {said}" if said else "")
        )
    state.progress.micro_batch = now // 2
    gc.collect()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    return (
        f"out of memory with a micro-batch of {now}: going on with {now // 2} and more accumulation; "
        f"the effective batch stays. Next time: batch_size={now // 2}, and raise accumulate by as much."
    )
