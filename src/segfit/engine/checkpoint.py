"""Checkpoints that are either whole or not there."""

import contextlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from segfit.errors import SegFitError

FORMAT = 1


class Checkpoints:
    """The checkpoints of one run: `last.pt` to go on from, `best.pt` to evaluate.

    Args:
        folder: where they lie; made when the first one is saved.
    """

    def __init__(self, folder: Path) -> None:
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"

    def save_last(self, state: dict[str, Any]) -> None:
        """Save all that training needs to go on."""
        save_atomically({"format": FORMAT, **state}, self.last)

    def save_best(self, weights: dict[str, Any], scores: dict[str, float], epoch: int) -> None:
        """Save the weights of the best validation."""
        content = {"format": FORMAT, "model": weights, "scores": scores, "epoch": epoch}
        save_atomically(content, self.best)


def save_atomically(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` holds the old one or the whole new one, whatever happens.

    Raises:
        SegFitError: if it cannot be written (disk full, read-only); the old one is untouched.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())  # the name must not be on disk before the content is
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise SegFitError(
            f"cannot save {path}: {error}. The checkpoint before it is kept."
        ) from error
    finally:
        # Nothing is left of a failure, of a second Ctrl-C, or of an earlier process that was killed meanwhile.
        for leftover in path.parent.glob(f".{path.name}.*.partial"):
            with contextlib.suppress(OSError):
                leftover.unlink()
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return  # Windows cannot open a folder; NTFS journals the rename
    handle = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # some network file systems know no fsync of a folder
        os.fsync(handle)
    os.close(handle)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, so that a stranger's file cannot run code.

    Raises:
        SegFitError: if it is missing, damaged, or holds anything else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise SegFitError(f"{path}: there is no such checkpoint.") from error
    except pickle.UnpicklingError as error:
        raise SegFitError(
            f"{path}: refused, it holds more than tensors and plain values, or is damaged."
        ) from error
    except (OSError, RuntimeError, EOFError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise SegFitError(f"{path}: not a readable checkpoint ({error}).") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "model" not in content:
        raise SegFitError(f"{path}: not a checkpoint of this version of SegFit.")
    return content
