"""When the state of a training is saved, and what happens where it cannot be."""

import time
from collections.abc import Callable

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.findings import Findings
from segfit.engine.non_finite import NotFinite, are_finite
from segfit.engine.state import TrainingState
from segfit.errors import SegFitError


class Saver:
    """Saves a state that is worth it; a full disk is told and costs no training.

    Every process of the world has to call every method; the main one writes.

    Args:
        state: what is saved.
        checkpoints: where.
        every_steps: updates between two saves inside an epoch, or None.
        every_minutes: minutes between them, or None.
        notice: told what cannot be saved.

    Attributes:
        unsaved: why the state that was due last is not on the disk, or None; known to the main process alone.
    """

    def __init__(
        self,
        state: TrainingState,
        checkpoints: Checkpoints,
        every_steps: int | None,
        every_minutes: float | None,
        notice: Callable[[str], None],
    ) -> None:
        self.state = state
        self.checkpoints = checkpoints
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.notice = notice
        self.unsaved: str | None = None
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Say whether it is time to save inside an epoch."""
        if self.every_steps is not None and self.state.progress.update % self.every_steps == 0:
            return True
        minutes = self.every_minutes
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self) -> None:
        """Save the state; what keeps it from being saved is told, and it is tried again when the next save is due.

        Raises:
            NotFinite: if the weights are not finite; what was saved last is from before.
        """
        self.state.average_buffers()
        models = {self.state.model, self.state.evaluated()}
        if not are_finite(value for model in models for value in model.state_dict().values()):
            raise NotFinite("norm of the weights is not finite")
        self._saved_at = time.monotonic()
        content = self.state.state_dict()
        if not self.state.world.is_main:
            return
        try:
            self.checkpoints.save_last(content)  # synchronises: copies to the host
            self.unsaved = None
        except SegFitError as error:
            self.unsaved = str(error)
            self.notice(f"{error} Training goes on; it is tried again later.")

    def save_in_the_end(self) -> None:
        """Save the state, or leave the last good one if the weights are not finite."""
        try:
            self.save()
        except NotFinite as found:
            self.notice(f"the {found}: {self.checkpoints.last} stays as it was.")

    def insist(self) -> None:
        """Try once more to save what could not be saved when it was due."""
        if self.state.world.max(int(self.unsaved is not None)) == (1,):
            self.save_in_the_end()

    def save_best(self, result: Findings) -> bool:
        """Save the weights that were validated; return whether that went well."""
        world, progress, failed = self.state.world, self.state.progress, False
        if world.is_main:
            try:
                weights = self.state.evaluated().state_dict()
                self.checkpoints.save_best(weights, dict(result.scores), progress.epoch)
            except SegFitError as error:
                failed = True
                self.notice(f"{error} This validation does not count as the best.")
        return world.max(int(failed)) == (0,)
