"""One process at a time in a folder: a lock that ends with the process, however it ends."""

import contextlib
import os
import socket
import time
from pathlib import Path
from types import ModuleType

from segfit.errors import SegFitError

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _FCNTL: ModuleType | None = None
else:
    _FCNTL = _fcntl

LOCK = ".lock"
_held: dict[Path, int] = {}


class InUseError(SegFitError):
    """Another process works in the folder."""


def lock(folder: Path) -> None:
    """Take a folder for the rest of this process's life; the kernel gives it back, after SIGKILL too.

    Where there are no such locks (Windows, some network file systems, a folder that is read only) it goes on
    without.

    Raises:
        InUseError: if another process has it; names the process.
        SegFitError: if the lock's file is a link.
    """
    place = folder.resolve()
    if _FCNTL is None or place in _held:
        return
    handle = _open(folder, os.O_CREAT)
    if handle is None:
        return
    for wait in (0.05, 0.1, None):  # whoever only asks has it for a moment
        try:
            _FCNTL.flock(handle, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
            break
        except BlockingIOError:
            if wait is not None:
                time.sleep(wait)
                continue
            who = _owner(handle)
            os.close(handle)
            raise InUseError(
                f"{folder} is in use by {who}. Wait until that is done, or end it; or take another folder."
            ) from None
        except OSError:  # this file system knows no locks
            os.close(handle)
            return
    if not _is_at(handle, folder / LOCK):  # who had it has removed it meanwhile
        os.close(handle)
        lock(folder)
        return
    _held[place] = handle
    with contextlib.suppress(OSError):  # a full disk: the lock holds, but does not say whose it is
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def holder(folder: Path) -> str | None:
    """Say which process has a folder ("process 123 on host"); None: nobody, or this one."""
    if _FCNTL is None or folder.resolve() in _held:
        return None
    handle = _open(folder)
    if handle is None:
        return None
    try:
        _FCNTL.flock(handle, _FCNTL.LOCK_SH | _FCNTL.LOCK_NB)
    except BlockingIOError:
        return _owner(handle)
    except OSError:
        return None
    finally:
        os.close(handle)
    return None


def release(folder: Path) -> None:
    """Give a folder back that this process has, and leave no trace of the lock."""
    handle = _held.pop(folder.resolve(), None)
    if handle is not None:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(handle)


def _open(folder: Path, flags: int = 0) -> int | None:
    path = folder / LOCK
    if path.is_symlink():
        raise SegFitError(f"{path}: refused, it is a link; what it leads to would be overwritten.")
    try:
        return os.open(path, os.O_RDWR | flags, 0o644)
    except OSError:
        return None


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    text = os.pread(handle, 200, 0).decode(errors="replace").strip()
    return "".join(c for c in text if c.isprintable()) or "another process"


def _forget() -> None:
    """Let a forked process, such as a data worker, not keep the lock alive when this one is gone."""
    for handle in _held.values():
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
