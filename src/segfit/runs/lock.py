"""One process at a time in a folder: a lock that ends with the process, however it ends."""

import contextlib
import os
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from segfit.errors import SegFitError

LOCK, OWNER = ".lock", ".lock-owner"
_held: dict[Path, FileLock] = {}


class InUseError(SegFitError):
    """Another process works in the folder."""


def lock(folder: Path) -> None:
    """Lock a folder for the rest of this process's life; the system unlocks it, after SIGKILL too.

    Continues without a lock where it is not possible: a read-only folder, a network file system without locks. Raises an
    InUseError, which names the other process, if that has locked it.
    """
    place = folder.resolve()
    if place in _held:
        return
    own = FileLock(place / LOCK, timeout=0.2)  # `holder` locks it for a moment too
    try:
        own.acquire()
    except Timeout:
        raise InUseError(
            f"{folder} is in use by {_owner(folder)}. Wait until that is done, or end it; or choose another folder."
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks: train without one
        return
    _held[place] = own
    with contextlib.suppress(OSError):  # a full disk: the lock holds, but without a name
        (place / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")


def holder(folder: Path) -> str | None:
    """Return which other process has locked a folder ("process 123 on host"); None: no other."""
    place = folder.resolve()
    if place in _held or not (place / LOCK).exists():
        return None
    try:
        with FileLock(place / LOCK, timeout=0.1):
            return None
    except Timeout:
        return _owner(folder)
    except (OSError, NotImplementedError):  # a file system without locks
        return None


def release(folder: Path) -> None:
    """Unlock a folder that this process has locked, and remove the lock's files."""
    own = _held.pop(folder.resolve(), None)
    if own is not None:
        own.release()
        for name in (LOCK, OWNER):
            with contextlib.suppress(OSError):
                (folder / name).unlink()


def _owner(folder: Path) -> str:
    """Return who wrote down that it has the lock: not in the lock's own file, which Windows lets nobody read."""
    try:
        text = (folder / OWNER).read_text(errors="replace")[:200].strip()
    except OSError:
        text = ""
    return "".join(c for c in text if c.isprintable()) or "another process"
