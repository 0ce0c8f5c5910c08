"""The update of a window, whatever gets in its way: memory, the compiler, numbers that are not finite."""

from collections.abc import Callable

from torch import Tensor

from segfit.engine.compiling import give_up_compiling, is_compile_error
from segfit.engine.non_finite import HalfMoved, NotFinite, are_finite
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.recovery import Recovery
from segfit.engine.seeding import derive_seed
from segfit.engine.state import TrainingState
from segfit.engine.step import PartlyUpdated, count_update, halve_micro_batch, make_update
from segfit.engine.task import Batch, Task, count_samples


class Updater:
    """Makes updates, and makes them again in another way where that helps.

    Args:
        state: what is trained.
        task: what a batch means.
        recovery: knows which updates to watch and to leave out.
        names: a batch → a name of each of its samples.
        seed: the run's.
        clip_grad_norm: largest norm of the gradient, or None.
        notice: told what was changed.
    """

    def __init__(
        self,
        state: TrainingState,
        task: Task,
        recovery: Recovery,
        names: Callable[[Batch], list[str]],
        *,
        seed: int,
        clip_grad_norm: float | None,
        notice: Callable[[str], None],
    ) -> None:
        self.state = state
        self.task = task
        self.recovery = recovery
        self.names = names
        self.seed = seed
        self.clip_grad_norm = clip_grad_norm
        self.notice = notice

    def update(self, window: list[Batch]) -> tuple[Tensor, Tensor] | None:
        """Make an update; return its loss and norm, None if it was left out.

        Raises:
            NotFinite: if the weights are not to be used any more.
            SegFitError: if a single sample does not fit, or too many updates were left out.
        """
        if self.recovery.is_left_out():
            count_update(self.state)
            return None
        model, watched = self.state.model, self.recovery.watching
        buffers = [buffer.clone() for buffer in model.buffers()] if watched else []
        while True:
            try:
                return make_update(
                    self.state,
                    self.task,
                    window,
                    self._seeds(window),
                    self.clip_grad_norm,
                    watched=watched,
                )
            except NotFinite as found:
                self._refuse_spoilt_weights()
                # The forward pass of a bad batch spoils batch norm's statistics.
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                names = [self.names(batch) for batch in window]
                told = self.recovery.leave_out(window, names, str(found))
                self.notice(told)
                count_update(self.state)
                return None
            except PartlyUpdated as error:
                said, spoilt = str(error), True
            except Exception as error:
                said, spoilt = str(error).partition("\n")[0], False
                if is_compile_error(error) and self.state.world.size == 1:
                    self.state.forward = self.state.model
                    self.notice(give_up_compiling(error))
                    continue
                if not is_out_of_memory(error):
                    raise
            # Outside of the `except`, where the traceback no longer holds the pass's tensors.
            largest = max(count_samples(batch) for batch in window)
            self.notice(halve_micro_batch(self.state, largest, said))
            self.state.renew_forward()
            if spoilt:
                raise HalfMoved(f"update ran out of memory while weights were moved ({said})")

    def _refuse_spoilt_weights(self) -> None:
        """Send the training back once more if weights were spoilt between two updates: no batch did that.

        Raises:
            NotFinite: if so.
        """
        spoilt = not are_finite(self.state.model.parameters())  # synchronises
        if self.state.world.max(int(spoilt)) == (1,):
            raise NotFinite("norm of the weights is not finite")

    def _seeds(self, window: list[Batch]) -> list[int]:
        """Return a seed for each micro-batch, a function of the position of its first sample."""
        progress, world, seeds = self.state.progress, self.state.world, []
        position = progress.sample
        for batch in window:
            size = count_samples(batch)
            first = position + world.rank * size
            seeds.append(derive_seed(self.seed, progress.epoch, first // size))
            position += world.size * size
        return seeds
