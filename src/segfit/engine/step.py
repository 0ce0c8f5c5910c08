"""One optimizer update, from the batches to the new weights, and what happens where it fails."""

import math
from collections.abc import Iterable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from segfit.engine.distributed import PeerFailed
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.state import TrainingState
from segfit.engine.task import Batch, Task, count_samples
from segfit.errors import SegFitError
from segfit.system.monitor import phase


class NotFinite(Exception):  # noqa: N818 - the training can recover from it
    """`args[0]` says what is not finite."""


class PartlyUpdated(MemoryError):  # noqa: N818 - what it leaves behind matters more than its cause
    """Memory ran out while gradients, weights or their averages changed: load a checkpoint before continuing."""


def make_update(
    state: TrainingState,
    task: Task,
    micro_batches: Sequence[Batch],
    seeds: Sequence[int],
    clip_grad_norm: float | None,
    *,
    check_finite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make one optimizer update; it equals that of one big batch of all micro-batches of all processes.

    Nothing here waits for the device, except GradScaler in fp16 when the optimizer is not a fused one, and
    `check_finite`, which reads loss and gradient norm before the weights change. Batches are on the device; each has a seed
    for its augmentation. `state.progress.update` counts the update afterwards.

    Returns:
        This process's share of the loss, the gradient's norm before clipping, and whether anything counted in the loss, each
        () on the device.

    Raises:
        NotFinite: if check_finite is set and the loss or the gradient is not finite; no weight has changed.
        PartlyUpdated: if memory ran out after the backward pass.
        PeerFailed: if another process failed.
        SegFitError: if memory runs out where smaller micro-batches do not help.
        Exception: of the forward or backward pass; no weight has changed. If it is_out_of_memory, every process raises
            such an error, and the update may be tried again.
    """
    distributed, scaler = state.distributed, state.scaler
    with _Attempt(state, task, micro_batches) as attempt:
        with phase("augmentation"):
            seeded = zip(micro_batches, seeds, strict=True)
            pieces = [task.prepare(batch, seed) for batch, seed in seeded]
            totals = torch.stack([task.totals(targets) for _, targets in pieces]).sum(0)

        attempt.begin("passes")
        totals = distributed.sum(totals)  # the denominators of the loss over the big batch
        if state.progress.micro_batch:  # memory ran out before: smaller pieces, more accumulation
            largest = state.progress.micro_batch
            pieces = [small for piece in pieces for small in task.split(*piece, largest)]

        loss = torch.zeros((), device=state.device)
        for number, (inputs, targets) in enumerate(pieces, start=1):
            # DistributedDataParallel sums gradients in the last backward, where a process that runs out of memory would
            # leave the others waiting. The first update shows whether memory suffices, and sums them afterwards.
            sync = number == len(pieces) and state.proven
            with nullcontext() if sync else distributed.no_sync(state.forward):
                with phase("forward"):
                    with state.precision.autocast():  # backward runs in the types chosen here
                        outputs = state.forward(inputs)
                    part = task.loss(outputs, targets, totals)  # outside: losses are summed in fp32
                    del outputs  # backward frees it
                if sync:
                    attempt.begin("passes", agreed=False)
                with phase("backward"):
                    # Gradients are averaged over processes: times their number, they are summed.
                    share = part * distributed.size if distributed.size > 1 else part
                    scaler.scale(share).backward()  # fp16 gradients would underflow unscaled
            loss += part.detach()
        if not state.proven:
            attempt.begin("passes", agreed=False)
            distributed.average_gradients(state.model)

        with phase("optimizer"):
            attempt.begin("optimizer", agreed=not state.proven)
            scaler.unscale_(state.optimizer)  # before clipping, which needs the true gradients
            norm = clip_gradients(state.model, clip_grad_norm)
            if check_finite:
                attempt.begin("optimizer", agreed=False)
                total = float(distributed.sum(loss))  # synchronises
                found = not_finite(total, float(norm), scaler.get_scale())  # synchronises
                if found is not None:
                    raise NotFinite(found)
                attempt.begin("optimizer", agreed=not state.proven)
            # Skips the update if a gradient overflowed in fp16; synchronises there unless fused.
            scaler.step(state.optimizer)
            scaler.update()  # after step: lowers the scale if step skipped
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.update(state.model, step=state.progress.update + 1)
            attempt.agree()
            count_update(state)
    state.proven = True
    return loss, norm, (totals > 0).any()


class _Attempt:
    """Keeps the processes of an update together when one fails, and says what can be done where memory runs out.

    An update has three stages: "augmentation" of whole batches, "passes" forward and backward, and the "optimizer", which
    changes gradients, weights and averages in place.
    """

    def __init__(self, state: TrainingState, task: Task, micro_batches: Sequence[Batch]) -> None:
        self.state, self.task, self.micro_batches = state, task, micro_batches
        self.stage = "augmentation"
        self.agreed = True  # every process of the training will know whether one failed here
        self.announced = False  # this process has said whether it failed

    def begin(self, stage: str, *, agreed: bool = True) -> None:
        """Begin the next stage, once all processes got through this one if that is agreed upon.

        Agreeing costs a round trip between the hosts. Without it, a process that runs out of memory ends the training.
        Raises a MemoryError if another process ran out of memory, PeerFailed if it failed otherwise.
        """
        self.agree()
        self.stage, self.agreed, self.announced = stage, agreed, False

    def agree(self) -> None:
        """Wait for the other processes if this stage is agreed upon; raises as `begin` does."""
        if self.agreed:
            self.announced = True
            (worst,) = self.state.distributed.max(0)
            if worst == 1:
                raise MemoryError("another process of this training ran out of memory")
            if worst == 2:
                raise PeerFailed

    def __enter__(self) -> "_Attempt":
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if not isinstance(error, Exception):
            return
        state, out_of_memory = self.state, is_out_of_memory(error)
        if self.agreed and not self.announced:
            state.distributed.max(1 if out_of_memory else 2)
        state.optimizer.zero_grad(set_to_none=True)  # the next try must not add to these
        if self.stage == "optimizer" and state.scaler.is_enabled():
            # GradScaler forgets that it unscaled, and keeps its scale. Synchronises.
            state.scaler.update(state.scaler.get_scale())
        if not out_of_memory:
            return
        reason = str(error).partition("\n")[0]
        if self.stage == "augmentation":
            samples = f"{len(self.micro_batches)} × {count_samples(self.micro_batches[0])} samples"
            raise SegFitError(
                f"out of memory before the forward pass, with {samples} to augment on the device. Lower batch_size or "
                f"accumulate first. {self.task.memory_advice} The error was: {reason}"
            ) from None
        if state.distributed.size > 1 and not self.agreed:
            raise SegFitError(
                f"process {state.distributed.rank} of {state.distributed.size} ran out of memory in a step that all "
                f"processes take together. Resume the run with half the batch_size and twice the accumulate."
            ) from error
        if self.stage == "optimizer":
            what = f"update ran out of memory while weights were changed ({reason})"
            raise PartlyUpdated(what) from None


def count_update(state: TrainingState) -> None:
    """Count an update, made or left out, and set the learning rates for the next."""
    state.progress.update += 1
    state.scheduler.step_update(state.progress.update + state.schedule_offset)


def not_finite(loss: float, norm: float, scale: float = 1.0) -> str | None:
    """Return what is not finite about an update, or None.

    A gradient that overflows while the loss is scaled up (`scale`, 1.0 outside fp16) is no fault: GradScaler skips the
    update and lowers the scale. One that overflows unscaled is. `norm` is that of the unscaled gradient.
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(norm) and scale <= 1.0:
        return f"gradient's norm is {norm}"
    return None


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all floating-point tensors among `tensors`, and their common norm, are finite; synchronises."""
    norm = get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()])
    return bool(norm.isfinite())


def clip_gradients(model: nn.Module, largest: float | None) -> Tensor:
    """Scale all gradients so that their common norm is `largest` at most; return the norm before, ().

    None leaves them as they are, which saves a pass over them.
    """
    parameters = list(model.parameters())
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # on a CPU, reading the norm costs nothing and may save a pass over all gradients
    if largest is not None and not (norm.is_cpu and norm <= largest):
        clip_grads_with_norm_(parameters, largest, norm)
    return norm
