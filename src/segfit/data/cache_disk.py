"""Decoded images and masks on disk: one file an item, named by what it was made from."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import IO

import numpy as np

from segfit.data.source import Image, Mask
from segfit.errors import SegFitError

try:
    import fcntl as _fcntl
except ImportError:  # Windows
    _FCNTL: ModuleType | None = None
else:
    _FCNTL = _fcntl

# magic and version, the item's name, image height and width, mask height and width, CRC-32 of all else
_HEADER = struct.Struct("<8s48s4II")
_MAGIC = b"SEGFIT\x00\x01"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GIB = 1 << 30
_RESERVE = _GIB // 4  # bytes that stay free for checkpoints
_ATTEMPTS = 3  # to write a file that another run takes for abandoned


class DiskStore:
    """Items in files below a folder, which all workers and any number of runs share.

    A file is written beside its place and renamed into it, so it is whole or not there, whoever is killed
    when; two runs that make the same item write the same file twice. The kernel's lock on it says whether its writer
    lives; its age would say nothing where a clock is wrong. A file says what it is and has a
    checksum: what was damaged or put there by somebody else reads as missing. Nothing in it is executed.

    One read of a small file (10 µs for 256 px) is faster than mapping it (21 µs), and is safe from others
    who truncate it; the system's page cache holds it once for all processes.

    Args:
        folder: where they are; made when the first item is put.
        names: one an item: what it is and, after the "-", the state of its files. At most 48 ASCII characters.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = list(names)

    def missing(self) -> list[int]:
        """Return the items that have no file yet, and remove what outdated files and killed writers left."""
        found = self._listing()
        wanted = {name.partition("-")[0]: name for name in self.names}
        for name, path in found.items():
            identity = name.partition("-")[0]
            if wanted.get(identity, name) != name:
                with contextlib.suppress(OSError):
                    path.unlink()
        return [index for index, name in enumerate(self.names) if name not in found]

    def _listing(self) -> dict[str, Path]:
        """Return the files by name; half-written ones that were given up are removed."""
        found = {}
        for path in self.folder.glob("??/*"):
            if path.suffix != ".tmp":
                found[path.name] = path
                continue
            with contextlib.suppress(OSError):
                if _is_abandoned(path):
                    path.unlink()
        return found

    def has(self, index: int) -> bool:
        """Say whether an item has a file by now."""
        return self._path(index).exists()

    def get(self, index: int) -> tuple[Image, Mask] | None:
        """Return image (H, W, 3) and mask (h, w), both uint8 and the caller's own; None: not here, or damaged."""
        content = self._content(index)
        if content is None:
            return None
        magic, name, height, width, mask_height, mask_width, checksum = _HEADER.unpack_from(
            content.data
        )
        pixels = 3 * height * width
        good = (
            magic == _MAGIC
            and name.rstrip(b"\0") == self.names[index].encode()
            and len(content) == _HEADER.size + pixels + mask_height * mask_width
            and min(height, width, mask_height, mask_width) > 0
            and checksum == _checksum(content)
        )
        if not good:
            return None
        image = content[_HEADER.size : _HEADER.size + pixels].reshape(height, width, 3)
        return image, content[_HEADER.size + pixels :].reshape(mask_height, mask_width)

    def _content(self, index: int) -> Image | None:
        try:
            with self._path(index).open("rb", buffering=0) as file:
                content = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
                whole = file.readinto(content.data) == len(content)
        except (OSError, ValueError, MemoryError):
            return None
        return content if whole and len(content) >= _HEADER.size else None

    def put(self, index: int, image: Image, mask: Mask) -> None:
        """Keep an item.

        Raises:
            SegFitError: if it cannot be written.
        """
        path, content = self._path(index), _pack(self.names[index], image, mask)
        for attempt in range(1, _ATTEMPTS + 1):
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(part, content, path)
                return
            except FileNotFoundError as error:  # removed between its opening and its lock
                if attempt == _ATTEMPTS:
                    raise SegFitError(_cannot_write(self.folder, error)) from error
            except OSError as error:
                with contextlib.suppress(OSError):
                    part.unlink()
                raise SegFitError(_cannot_write(self.folder, error)) from error

    def mend(self, index: int, image: Image, mask: Mask) -> None:
        """Put back what was lost or damaged, where that is possible."""
        with contextlib.suppress(SegFitError):
            self.put(index, image, mask)

    def nbytes(self) -> int:
        """Return the bytes of all items that are there."""
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
                f"{self.folder}: the images need about {size / _GIB:.1f} GiB decoded (data.cache=disk), but "
                f"{free / _GIB:.1f} GiB are free there. Free some space, set data.cache_dir to a folder on "
                "another disk, or data.cache=none."
            )

    def _path(self, index: int) -> Path:
        name = self.names[index]
        return self.folder / name[:2] / name


def _write(part: Path, content: bytearray, path: Path) -> None:
    """Write a file, locked until it has its name."""
    with part.open("xb") as file:
        if _FCNTL is None:
            file.write(content)
        else:
            _lock(file)
            file.write(content)
            file.flush()
            part.replace(path)
    if _FCNTL is None:  # Windows renames no open file
        part.replace(path)


def _lock(file: IO[bytes]) -> bool:
    """Lock a file; say whether that went well: not where another process has it, or the file system has no locks."""
    try:
        assert _FCNTL is not None
        _FCNTL.flock(file, _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
    except OSError:
        return False
    return True


def _is_abandoned(part: Path) -> bool:
    """Say whether a half-written file has no writer any more; False where nobody knows."""
    if _FCNTL is None:
        return False
    with part.open("r+b") as file:
        return _lock(file)


def _pack(name: str, image: Image, mask: Mask) -> bytearray:
    shape = (*image.shape[:2], *mask.shape)
    content = bytearray(_HEADER.pack(_MAGIC, name.encode(), *shape, 0))
    content += np.ascontiguousarray(image).data.cast("B")
    content += np.ascontiguousarray(mask).data.cast("B")
    _HEADER.pack_into(
        content, 0, _MAGIC, name.encode(), *shape, _checksum(np.frombuffer(content, np.uint8))
    )
    return content


def _checksum(content: Image) -> int:
    """Return the CRC-32 of a file but for the place where it is written."""
    end = _HEADER.size
    return zlib.crc32(content[end:].data, zlib.crc32(content[: end - 4].data))


def _cannot_write(folder: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return (
            f"{folder}: the disk is full (data.cache=disk). What was made so far stays and is used next time. Free "
            "some space, set data.cache_dir to a folder on another disk, or data.cache=none."
        )
    return (
        f"{folder}: cannot be written to ({error.strerror}), as data.cache=disk needs. Set data.cache_dir to "
        "a folder of your own, or data.cache=none."
    )
