"""Updates that failed are made again in another way: in smaller pieces, without the compiler, or from a checkpoint."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from segfit.engine.checkpoint import Checkpoints, write_tensors
from segfit.engine.compiling import give_up_compiling, is_compile_error, without_graphs
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.state import TrainingState, derive_seed
from segfit.engine.step import NotFinite, PartlyUpdated, are_finite, count_update, make_update
from segfit.engine.task import Batch, FitOptions, Task, count_samples
from segfit.errors import SegFitError

_NAMES_SHOWN = 8
_ADVICE = "Lower lr, keep clip_grad_norm, or try precision=fp32."


@dataclass(eq=False)
class Recovery:
    """Makes updates, and makes them again where that helps.

    Losses and gradients are read from the device only when the loop logs. If one of them is not finite by then, weights
    are lost already. The training goes back to its last checkpoint and makes the same updates again, which are a function
    of position alone, but checks each of them before weights change: the first that is not finite is the cause. Its batch
    is saved, and the update is left out.
    """

    state: TrainingState
    task: Task
    checkpoints: Checkpoints  # where the last good state is
    names: Callable[[Batch], list[str]]  # a name for each sample of a batch
    options: FitOptions
    notice: Callable[[str], None]  # called with a line about everything that was done
    bad_batches: Path  # folder for batches that are left out

    def __post_init__(self) -> None:
        self._check_until = 0
        self._cause_found = True
        self._fruitless = 0  # times that the updates were all finite the second time

    @property
    def checking(self) -> bool:
        """Whether the next update is checked before the weights change."""
        return self.state.progress.update < self._check_until

    def update(self, micro_batches: list[Batch]) -> tuple[Tensor, Tensor, Tensor] | None:
        """Make an update; return what `make_update` does, or None if it was left out.

        Raises NotFinite if the weights are not finite, PartlyUpdated if some were updated and some were not: `roll_back`
        helps; a SegFitError if a single sample does not fit into memory, or too many updates were left out.
        """
        state, progress = self.state, self.state.progress
        if [progress.epoch, progress.sample] in progress.left_out:
            count_update(state)
            return None
        buffers = [buffer.clone() for buffer in state.model.buffers()] if self.checking else []
        while True:
            if state.graphs and progress.micro_batch:  # of this session, or of the one before
                state.graphs = False
                state.forward, notice = without_graphs(state.model)
                self.notice(notice)
            try:
                return make_update(
                    state,
                    self.task,
                    micro_batches,
                    self.seeds(micro_batches),
                    self.options.clip_grad_norm,
                    check_finite=self.checking,
                )
            except NotFinite as found:
                self._leave_out(micro_batches, str(found), buffers)
                return None
            except Exception as error:
                reason, partly = str(error).partition("\n")[0], isinstance(error, PartlyUpdated)
                if is_compile_error(error) and state.distributed.size == 1:
                    state.forward, state.graphs = state.model, False
                    self.notice(give_up_compiling(error))
                    continue
                if not is_out_of_memory(error):
                    raise
            # Outside of `except`, where no traceback holds the failed pass's tensors.
            largest = max(count_samples(batch) for batch in micro_batches)
            self.notice(halve_micro_batch(state, largest, self.task.memory_advice, reason))
            state.renew_forward()
            if partly:
                raise PartlyUpdated(reason)

    def roll_back(self, found: NotFinite | PartlyUpdated) -> None:
        """Load the last good state; after NotFinite, check the updates from there up to the present one.

        What was learned since stays: smaller micro-batches, updates to leave out. Raises a SegFitError if that happened
        too often, or there is no checkpoint to go back to.
        """
        lost, check = self.state.progress, isinstance(found, NotFinite)
        if check:
            self._fruitless += not self._cause_found
            self._cause_found = False
            self._stop_if_too_many(str(found))
        try:
            content, _ = self.checkpoints.load_last()
        except SegFitError as error:
            reason = f"and there is no state to go back to ({error}). {_ADVICE}"
            raise SegFitError(f"the {found}, {reason}") from error
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.load_state_dict(content)
        progress = self.state.progress
        progress.micro_batch, progress.held_out_batch = lost.micro_batch, lost.held_out_batch
        progress.left_out = lost.left_out
        if check:
            self._check_until = lost.update
        self.notice(
            f"the {found}: going back from update {lost.update} to {progress.update}, the last good state"
            f"{', and checking each update from there' * check}."
        )

    def _leave_out(
        self, micro_batches: Sequence[Batch], found: str, buffers: Sequence[Tensor]
    ) -> None:
        """Save the batch of an update that is not finite and remember to leave it out; every process has to call.

        Raises NotFinite if the weights were not finite before the update, whose batch is not the cause, a SegFitError if
        too many were left out.
        """
        state, progress, distributed = self.state, self.state.progress, self.state.distributed
        finite = are_finite(state.model.parameters())  # synchronises
        if distributed.max(int(not finite)) == (1,):
            raise NotFinite("norm of the weights is not finite")
        # The forward pass of a bad batch leaves NaN in batch norm's statistics.
        for buffer, before in zip(state.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self._cause_found = True
        progress.left_out.append([progress.epoch, progress.sample])
        batches: list[dict[str, Any]] = [
            {"names": self.names(one), **{key: value.cpu() for key, value in one.items()}}
            for one in micro_batches
        ]  # synchronises
        rank = f"-rank{distributed.rank}" if distributed.size > 1 else ""
        path = self.bad_batches / f"update-{progress.update + 1:06d}{rank}.pt"
        try:
            write_tensors({"found": found, "batches": batches}, path)
            where = f"saved as {path}"
        except OSError as error:
            where = f"which could not be saved ({error.args[-1]})"
        names = [name for batch in batches for name in batch["names"]]
        every = [name for process in distributed.gather(names) for name in process]
        more = len(every) - _NAMES_SHOWN
        shown = ", ".join(every[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
        self._stop_if_too_many(found)
        self.notice(
            f"the {found} in update {progress.update + 1}: its batch ({shown}), {where}, is left out "
            f"({len(progress.left_out)} of at most {self.options.max_left_out})."
        )
        count_update(state)

    def _stop_if_too_many(self, found: str) -> None:
        count = len(self.state.progress.left_out)
        if count + self._fruitless <= self.options.max_left_out and self.options.max_left_out > 0:
            return
        batches = f" The batches are in {self.bad_batches}." if count else ""
        raise SegFitError(
            f"the {found}, within update {self.state.progress.update + 1} or shortly before; "
            f"max_left_out={self.options.max_left_out} is reached. {self.checkpoints.last} holds the last good state.{batches} "
            f"{_ADVICE}"
        )

    def seeds(self, micro_batches: Sequence[Batch]) -> list[int]:
        """Return a seed for each micro-batch, a function of the position of its first sample."""
        progress, distributed, seeds = self.state.progress, self.state.distributed, []
        position = progress.sample
        for size in map(count_samples, micro_batches):
            number = position // size + distributed.rank
            seeds.append(derive_seed(self.options.seed, progress.epoch, number))
            position += distributed.size * size
        return seeds


def halve_micro_batch(state: TrainingState, largest: int, advice: str, reason: str) -> str:
    """Halve the samples that a forward pass may take, after the device ran out of memory; return a notice that says so.

    Call this outside of the `except` block, whose traceback holds the failed pass's tensors. Raises a SegFitError if a
    single sample does not fit.
    """
    now = min(state.progress.micro_batch or largest, largest)
    if now <= 1:
        what = "out of memory with a micro-batch of a single sample."
        raise SegFitError(f"{what} {advice} The error was: {reason}")
    state.progress.micro_batch = now // 2
    release_memory()
    return (
        f"out of memory with a micro-batch of {now}: continuing with {now // 2} and more accumulation; "
        f"the effective batch stays. Next time: batch_size={now // 2}, and raise accumulate by as much."
    )
