"""Files that are whole or not there."""

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from segfit.errors import SegFitError


@contextlib.contextmanager
def atomic_write(
    path: Path, *, previous: Path | None = None, sync: bool = True
) -> Iterator[BinaryIO]:
    """Open a file for writing that replaces `path` when the block ends without an exception.

    Until then, and after a failure or a SIGKILL, `path` holds what it held before. A killed process leaves a
    partial file beside it; see `remove_partials`.

    The folder of `path` is made if it does not exist. The old file is renamed to `previous`, or replaced without it. `sync`
    flushes to the disk before renaming, so that a power cut cannot leave an empty file. May raise an OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short enough for any file system, and not that of another thread or process.
    writer = f"{os.getpid()}-{threading.get_ident()}"
    partial = path.with_name(f".{path.name[:50]}.{writer}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        if previous is not None and path.exists():
            path.replace(previous)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if sync and os.name == "posix":  # Windows cannot open a folder; NTFS journals the rename
        with contextlib.suppress(OSError):  # some network file systems cannot fsync a folder
            handle = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a text file as `atomic_write` does."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Raise an OSError of the block as a SegFitError: `what`, and the reason."""
    try:
        yield
    except OSError as error:
        raise SegFitError(f"{what}: {error.strerror or error}.") from error


def remove_partials(path: Path) -> None:
    """Remove what killed processes left of a file that only one process writes at a time."""
    for partial in path.parent.glob(f".{path.name[:50]}.*.partial"):
        with contextlib.suppress(OSError):
            partial.unlink()
