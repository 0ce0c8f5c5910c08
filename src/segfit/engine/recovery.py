"""What is done about an update that is not finite: roll back, look closely, leave it out, and stop in the end."""

from collections.abc import Sequence
from pathlib import Path

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.non_finite import HalfMoved, NotFinite, save_window
from segfit.engine.state import TrainingState
from segfit.engine.task import Batch
from segfit.errors import SegFitError

_NAMES_SHOWN = 8


class Recovery:
    """Brings a training back to its last good state, and past what spoilt it.

    Losses and gradients are read from the device only when the loop logs. If one of them is not finite by then, the
    weights are spoilt already. The training goes back to its last checkpoint and makes the same updates again, which
    are a function of position alone, but looks at each of them before the weights move: the first that is not finite is
    the culprit. Its batch is saved, and it is left out.

    Args:
        state: what is trained.
        checkpoints: where the last good state is.
        limit: updates that may be left out, over the whole run; one more ends it.
    """

    def __init__(self, state: TrainingState, checkpoints: Checkpoints, limit: int) -> None:
        self.state = state
        self.checkpoints = checkpoints
        self.limit = limit
        self._watch_until = 0
        self._culprit_found = True
        self._fruitless = 0  # times that nothing was found on the second look

    @property
    def watching(self) -> bool:
        """Whether the next update is to be looked at before the weights move."""
        return self.state.progress.update < self._watch_until

    def roll_back(self, found: NotFinite) -> str:
        """Load the last good state and watch the updates up to the present one; return a line for the person.

        What was learnt since stays: lowered micro-batches, updates to leave out.

        Args:
            found: why.

        Raises:
            SegFitError: if that happened too often, or there is nothing to go back to.
        """
        lost, look = self.state.progress, not isinstance(found, HalfMoved)
        if look:
            self._fruitless += not self._culprit_found
            self._culprit_found = False
            self._stop_if_too_many(str(found))
        try:
            content, _ = self.checkpoints.load_last()
        except SegFitError as error:
            raise SegFitError(
                f"the {found}, and there is no state to go back to ({error}). {_ADVICE}"
            ) from error
        self.state.optimizer.zero_grad(set_to_none=True)
        self.state.load_state_dict(content)
        progress = self.state.progress
        progress.micro_batch, progress.held_out_batch = lost.micro_batch, lost.held_out_batch
        progress.left_out = lost.left_out
        if look:
            self._watch_until = lost.update
        return (
            f"the {found}: going back from update {lost.update} to {progress.update}, the last good state"
            f"{', and looking at each update from there' * look}."
        )

    def is_left_out(self) -> bool:
        """Say whether the update at the present position was found not to be finite before."""
        progress = self.state.progress
        return [progress.epoch, progress.sample] in progress.left_out

    def leave_out(self, window: Sequence[Batch], names: Sequence[Sequence[str]], found: str) -> str:
        """Save the batch of an update that is not finite and remember to leave it out; return a line for the person.

        Every process of the world has to call.

        Args:
            window: its micro-batches.
            names: of the samples of each.
            found: what is not finite.

        Raises:
            SegFitError: if too many were left out.
        """
        progress, world = self.state.progress, self.state.world
        self._culprit_found = True
        progress.left_out.append([progress.epoch, progress.sample])
        rank = f"-rank{world.rank}" if world.size > 1 else ""
        path = self.bad_batches / f"update-{progress.update + 1:06d}{rank}.pt"
        try:
            save_window(path, window, names, found)
            where = f"saved as {path}"
        except OSError as error:
            where = f"which could not be saved ({error.args[-1]})"
        every = [
            name for rank_names in world.gather([*names]) for part in rank_names for name in part
        ]
        self._stop_if_too_many(found)
        return (
            f"the {found} in update {progress.update + 1}: its batch ({_some(every)}), {where}, is left out "
            f"({len(progress.left_out)} of at most {self.limit})."
        )

    @property
    def bad_batches(self) -> Path:
        """Where batches that were left out are saved."""
        return self.checkpoints.last.parent.parent / "bad_batches"

    def _stop_if_too_many(self, found: str) -> None:
        count = len(self.state.progress.left_out)
        if count + self._fruitless <= self.limit and self.limit > 0:
            return
        batches = f" The batches are in {self.bad_batches}." if count else ""
        raise SegFitError(
            f"the {found}, within update {self.state.progress.update + 1} or shortly before; max_left_out={self.limit} "
            f"is reached. {self.checkpoints.last} holds the last good state.{batches} {_ADVICE}"
        )


_ADVICE = "Lower lr, keep clip_grad_norm, or try precision=fp32."


def _some(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
