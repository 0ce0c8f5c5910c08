"""Checkpoints that are whole or not there, and when they are saved."""

import pickle
import time
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from segfit.engine.findings import Findings
from segfit.engine.state import TrainingState
from segfit.engine.step import NotFinite, are_finite
from segfit.engine.task import FitOptions
from segfit.errors import SegFitError
from segfit.system.files import atomic_write, remove_partials

FORMAT = 3


class DamagedCheckpointError(SegFitError):
    """A file that is no whole checkpoint: gone, cut short, or changed on the disk."""


class Checkpoints:
    """The checkpoints of one run in a folder, which is made when the first one is saved.

    `last.pt` to resume from, with `about`: plain values that say what the training is. `previous.pt` is the one before it,
    `best.pt` is there to evaluate.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any] | None = None) -> None:
        self.last = folder / "last.pt"
        self.previous = folder / "previous.pt"
        self.best = folder / "best.pt"
        self.about = dict(about or {})
        self._last_is_damaged = False

    def save_last(self, state: dict[str, Any]) -> None:
        """Save all that training needs to resume; a whole `last.pt` becomes `previous.pt`. Raises as `save_best`."""
        self._save(state, self.last, None if self._last_is_damaged else self.previous)
        self._last_is_damaged = False

    def save_best(self, weights: dict[str, Any], scores: dict[str, float], epoch: int) -> None:
        """Save the weights of the best validation.

        Raises a SegFitError if they cannot be written (disk full, read-only); the ones before are untouched.
        """
        self._save({"model": weights, "scores": scores, "epoch": epoch}, self.best)

    def _save(self, content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
        remove_partials(path)
        try:
            write_tensors({"format": FORMAT, "about": self.about, **content}, path, previous)
        except OSError as error:
            reason = f"{error.args[-1]}. The checkpoint before it is kept."
            raise SegFitError(f"cannot save {path}: {reason}") from error

    def exist(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return self.last.exists() or self.previous.exists()

    def load_last(self) -> tuple[dict[str, Any], str | None]:
        """Return the newest whole state, and a line about what was wrong with a newer one, if anything.

        Raises a SegFitError if there is none, or the newest is no checkpoint of ours.
        """
        try:
            return load_checkpoint(self.last), None
        except DamagedCheckpointError as error:
            if not self.previous.exists():
                raise
            reason = f"{error} Resuming from the one before it, {self.previous.name}."
        self._last_is_damaged = True
        return load_checkpoint(self.previous), reason


def write_tensors(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write tensors and plain values so that `path` holds the old ones or the whole new ones, whatever happens.

    The old file is renamed to `previous`, or replaced without it. The last argument of an OSError says why they cannot be
    written.
    """
    try:
        with atomic_write(path, previous=previous) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's own, which only says where in the file it was
        reason = error.__context__
        arguments = reason.args if isinstance(reason, OSError) else (str(error),)
        raise OSError(*arguments) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, so that an untrusted file cannot run code.

    Raises a DamagedCheckpointError if it is not there or not whole, a SegFitError if it is foreign, or holds anything else.
    """
    try:
        whole = _is_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{path}: there is no such checkpoint.") from error
    except pickle.UnpicklingError as error:
        kind = SegFitError if whole else DamagedCheckpointError
        reason = "refused, it holds more than tensors and plain values, or is damaged."
        raise kind(f"{path}: {reason}") from error
    except Exception as error:  # zip, pickle and torch fail in many ways over damage
        reason = str(error).partition(". ")[0].rstrip(".") or type(error).__name__
        raise DamagedCheckpointError(f"{path}: not a readable checkpoint ({reason}).") from error
    if not whole:
        raise DamagedCheckpointError(f"{path}: damaged, its content changed after it was written.")
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise SegFitError(f"{path}: not a checkpoint of this version of SegFit.")
    return content


def _is_whole(path: Path) -> bool:
    """Say whether each part has the checksum that was written with it, which torch does not check.

    Raises a ValueError if a part is compressed, and might unpack to any size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise ValueError("it has compressed parts, and torch writes none")
            return archive.testzip() is None
    except zipfile.BadZipFile:
        return False


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
        otherwise = "Training continues; it is tried again later."
        self.unsaved = self._failure(lambda: self.checkpoints.save_last(content), otherwise)

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
        weights, epoch = self.state.evaluated().state_dict(), self.state.progress.epoch
        failure = self._failure(
            lambda: self.checkpoints.save_best(weights, dict(result.scores), epoch),
            "This validation does not count as the best.",
        )
        return self.state.distributed.max(int(failure is not None)) == (0,)

    def _failure(self, save: Callable[[], None], otherwise: str) -> str | None:
        """Let the main process save; return why that failed, after a notice that also says what follows."""
        if self.state.distributed.is_main:
            try:
                save()  # synchronises: copies to the host
            except SegFitError as error:
                self.notice(f"{error} {otherwise}")
                return str(error)
        return None
