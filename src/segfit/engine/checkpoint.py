"""Checkpoints that are whole or not there."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from segfit.errors import SegFitError
from segfit.system.files import atomic_write, remove_partials

FORMAT = 3


class DamagedCheckpointError(SegFitError):
    """A file that is no whole checkpoint: cut short, or changed on the disk."""


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
        """Save all that training needs to resume; a whole `last.pt` becomes `previous.pt`. Raises as `save_atomically`."""
        content = {"format": FORMAT, "about": self.about, **state}
        save_atomically(content, self.last, None if self._last_is_damaged else self.previous)
        self._last_is_damaged = False

    def save_best(self, weights: dict[str, Any], scores: dict[str, float], epoch: int) -> None:
        """Save the weights of the best validation; raises as `save_atomically`."""
        content = {"about": self.about, "model": weights, "scores": scores, "epoch": epoch}
        save_atomically({"format": FORMAT, **content}, self.best)

    def exist(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return self.last.exists() or self.previous.exists()

    def load_last(self) -> tuple[dict[str, Any], str | None]:
        """Return the newest whole state, and a line about what was wrong with a newer one, if anything.

        Raises a SegFitError if there is none, or the newest is no checkpoint of ours.
        """
        try:
            if self.last.exists() or not self.previous.exists():
                return load_checkpoint(self.last), None
            reason = f"{self.last}: there is no such checkpoint."
        except DamagedCheckpointError as error:
            if not self.previous.exists():
                raise
            reason = str(error)
            self._last_is_damaged = True
        reason += f" Resuming from the one before it, {self.previous.name}."
        return load_checkpoint(self.previous), reason


def save_atomically(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint so that `path` holds the old one or the whole new one, whatever happens.

    The old file is renamed to `previous`, or replaced without it. Raises a SegFitError if the new one cannot be written
    (disk full, read-only); the old one is untouched.
    """
    remove_partials(path)
    try:
        write_tensors(content, path, previous)
    except OSError as error:
        reason = f"{error.args[-1]}. The checkpoint before it is kept."
        raise SegFitError(f"cannot save {path}: {reason}") from error


def write_tensors(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write tensors and plain values by `atomic_write`; the last argument of an OSError says why they cannot be written."""
    try:
        with atomic_write(path, previous=previous) as file:
            torch.save(content, file)
    except RuntimeError as error:  # torch's own, which only says where in the file it was
        reason = error.__context__
        arguments = reason.args if isinstance(reason, OSError) else (str(error),)
        raise OSError(*arguments) from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, so that an untrusted file cannot run code.

    Raises a DamagedCheckpointError if it is not whole, a SegFitError if it is missing, foreign, or holds anything else.
    """
    try:
        whole = _is_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SegFitError(f"{path}: there is no such checkpoint.") from error
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
