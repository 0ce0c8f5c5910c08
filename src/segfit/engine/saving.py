"""When the state of a training is saved, and what happens where it cannot be."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.findings import Findings
from segfit.engine.non_finite import NotFinite, are_finite
from segfit.engine.options import FitOptions
from segfit.engine.state import TrainingState
from segfit.errors import SegFitError


@dataclass(eq=False)
class CheckpointManager:
    """Saves finite states; where a disk is full, it logs a warning and training continues.

    Every process has to call every method; the main one writes.
    """

    state: TrainingState
    checkpoints: Checkpoints
    options: FitOptions
    notice: Callable[[str], None]

    def __post_init__(self) -> None:
        self.unsaved: str | None = None  # why the last save failed; known to the main process alone
        self._saved_at = time.monotonic()

    def is_due(self) -> bool:
        """Return whether it is time to save inside an epoch."""
        steps, minutes = self.options.every_steps, self.options.every_minutes
        if steps is not None and self.state.progress.update % steps == 0:
            return True
        return minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes

    def save(self) -> None:
        """Save the state; if that fails, log a warning and try again when the next save is due.

        Raises NotFinite if the weights are not finite; the last checkpoint is from before.
        """
        self.state.average_buffers()
        models = {self.state.model, self.state.evaluated()}
        # synchronises
        if not are_finite(value for model in models for value in model.state_dict().values()):
            raise NotFinite("norm of the weights is not finite")
        self._saved_at = time.monotonic()
        content = self.state.state_dict()
        if not self.state.distributed.is_main:
            return
        try:
            self.checkpoints.save_last(content)  # synchronises: copies to the host
            self.unsaved = None
        except SegFitError as error:
            self.unsaved = str(error)
            self.notice(f"{error} Training continues; it is tried again later.")

    def save_final(self) -> None:
        """Save the state, or keep the last good one if the weights are not finite."""
        try:
            self.save()
        except NotFinite as found:
            self.notice(f"the {found}: {self.checkpoints.last} stays as it was.")

    def retry_failed(self) -> None:
        """Save once more if the last save failed."""
        if self.state.distributed.max(int(self.unsaved is not None)) == (1,):
            self.save_final()

    def save_best(self, result: Findings) -> bool:
        """Save the weights that were validated; return whether that worked."""
        distributed, failed = self.state.distributed, False
        if distributed.is_main:
            try:
                weights = self.state.evaluated().state_dict()
                epoch = self.state.progress.epoch
                # synchronises: copies to the host
                self.checkpoints.save_best(weights, dict(result.scores), epoch)
            except SegFitError as error:
                failed = True
                self.notice(f"{error} This validation does not count as the best.")
        return distributed.max(int(failed)) == (0,)
