"""Samples on disk: one file each, named by what it was made from."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.data.packing import pack, unpack
from segfit.data.source import Arrays
from segfit.errors import SegFitError
from segfit.system.files import atomic_write

_HEADER = struct.Struct("<8s48sI4x")  # magic and version, the sample's name, CRC-32 of the arrays
_MAGIC = b"SEGFIT\x00\x02"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GIB = 1 << 30
_RESERVE = _GIB // 4  # bytes that stay free for checkpoints


@dataclass
class DiskStore:
    """Samples in files below a folder, which all workers and any number of runs share.

    A file is written beside its place and renamed into it, so it is whole or not there, even if the writer is
    killed; two runs that make the same sample write the same file twice. A file holds its name and a checksum: what
    was damaged or replaced reads as missing. Nothing in it is executed.

    One read of a small file (10 µs for 256 px) is faster than mapping it (21 µs), and safe from others who truncate it.
    """

    folder: Path  # made when the first sample is put
    # one a sample: what it is and, after the "-", the state of its files; at most 48 ASCII characters
    names: Sequence[str]

    def missing(self) -> list[int]:
        """Return the samples that have no file yet; remove outdated files, and partial ones of killed writers."""
        wanted = {name.partition("-")[0]: name for name in self.names}
        found = set()
        for path in self.folder.glob("??/*"):
            outdated = wanted.get(path.name.partition("-")[0], path.name) != path.name
            if not outdated and not path.name.startswith("."):
                found.add(path.name)
                continue
            with contextlib.suppress(OSError):  # another run may have removed it
                path.unlink()
        return [index for index, name in enumerate(self.names) if name not in found]

    def has(self, index: int) -> bool:
        """Return whether a sample has a file by now."""
        return self._path(index).exists()

    def get(self, index: int) -> Arrays | None:
        """Return the arrays of a sample, the caller's own; None if its file is missing or damaged."""
        try:
            with self._path(index).open("rb", buffering=0) as file:
                content = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
                whole = file.readinto(content.data) == len(content) >= _HEADER.size
        except (OSError, ValueError, MemoryError):
            return None
        if not whole or content[: _HEADER.size].tobytes() != self._header(index, content):
            return None
        return unpack(content[_HEADER.size :])

    def put(self, index: int, arrays: Arrays) -> None:
        """Keep a sample; raise a SegFitError if it cannot be written."""
        path = self._path(index)
        content = np.concatenate([np.zeros(_HEADER.size, np.uint8), pack(arrays)])
        content[: _HEADER.size] = np.frombuffer(self._header(index, content), np.uint8)
        for again in (True, False):
            try:
                # The checksum says whether it reached the disk.
                with atomic_write(path, sync=False) as file:
                    file.write(content.data)
                return
            except OSError as error:
                # Once, a run that started meanwhile may have removed the partial file.
                if not (again and isinstance(error, FileNotFoundError)):
                    raise SegFitError(_cannot_write(self.folder, error)) from error

    def nbytes(self) -> int:
        """Return the bytes of all samples that are there."""
        total = 0
        for index in range(len(self.names)):
            with contextlib.suppress(OSError):
                total += self._path(index).stat().st_size
        return total

    def check_room(self, size: int) -> None:
        """Raise a SegFitError if the disk has no room for `size` bytes, or the folder cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise SegFitError(_cannot_write(self.folder, error)) from error
        if size + _RESERVE > free:
            raise SegFitError(
                f"{self.folder}: the samples need about {size / _GIB:.1f} GiB decoded (data.cache=disk), but "
                f"{free / _GIB:.1f} GiB are free there. Free some space, set data.cache_dir to a folder on "
                "another disk, or data.cache=none."
            )

    def _path(self, index: int) -> Path:
        name = self.names[index]
        return self.folder / name[:2] / name

    def _header(self, index: int, content: NDArray[np.uint8]) -> bytes:
        """Return the header that a file with this content must have."""
        checksum = zlib.crc32(content[_HEADER.size :].data)
        return _HEADER.pack(_MAGIC, self.names[index].encode(), checksum)


def _cannot_write(folder: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return (
            f"{folder}: the disk is full (data.cache=disk). The samples that were written stay and are used next time. "
            "Free some space, set data.cache_dir to a folder on another disk, or data.cache=none."
        )
    return (
        f"{folder}: cannot be written to ({error.strerror}), as data.cache=disk needs. Set data.cache_dir to "
        "a folder of your own, or data.cache=none."
    )
