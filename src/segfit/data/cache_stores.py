"""Where decoded samples are kept: files, or memory that this process and its workers share."""

import contextlib
import json
import math
import mmap
import os
import shutil
import struct
import time
import weakref
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.data.source import Arrays
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.system.files import atomic_write
from segfit.system.hardware import free_memory

_ALIGNMENT = 64  # bytes; every array starts at a multiple, counted from the first byte
_HEADER = struct.Struct("<8s48sI4x")  # magic and version, the sample's name, CRC-32 of the arrays
_MAGIC = b"SEGFIT\x00\x02"
_ELSEWHERE = "Free some space, set data.cache_dir to another folder, or data.cache=none."
_DISK_RESERVE = GIB // 4  # bytes that stay free for checkpoints
_MEMORY_RESERVE = GIB  # bytes that stay free for the training itself
_BLOCK = 64 << 20  # bytes of memory that are taken at once


def pack(arrays: Arrays) -> NDArray[np.uint8]:
    """Return arrays (any dtype but object, any shape) as uint8 (N,), N a multiple of 64.

    The length of a header (4 bytes, little endian), the header (dtypes and shapes as JSON), then the arrays.
    """
    header = json.dumps([[array.dtype.str, array.shape] for array in arrays]).encode()
    header = struct.pack("<I", len(header)) + header
    parts = [np.frombuffer(header, np.uint8)]
    parts += [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]
    rests = [np.zeros(-len(part) % _ALIGNMENT, np.uint8) for part in parts]
    return np.concatenate([one for pair in zip(parts, rests, strict=True) for one in pair])


def unpack(content: NDArray[np.uint8]) -> Arrays:
    """Return the arrays that `pack` made `content` (N,) of: views of it."""
    stop = 4 + int.from_bytes(content[:4].tobytes(), "little")
    arrays = []
    for dtype, shape in json.loads(content[4:stop].tobytes()):
        start = stop + -stop % _ALIGNMENT
        stop = start + np.dtype(dtype).itemsize * math.prod(shape)
        arrays.append(content[start:stop].view(dtype).reshape(shape))
    return tuple(arrays)


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
        """Return the samples that have no file yet; remove outdated files, and partial ones that killed writers left."""
        wanted = {name.partition("-")[0]: name for name in self.names}
        found, long_ago = set(), time.time() - 3600
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):  # another run may have removed it
                partial = path.name.startswith(".") and path.stat().st_mtime < long_ago
                if partial or wanted.get(path.name.partition("-")[0], path.name) != path.name:
                    path.unlink()
                else:
                    found.add(path.name)
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
        content = np.concatenate([np.zeros(_HEADER.size, np.uint8), pack(arrays)])
        content[: _HEADER.size] = np.frombuffer(self._header(index, content), np.uint8)
        try:
            # The checksum says whether it reached the disk.
            with atomic_write(self._path(index), sync=False) as file:
                file.write(content.data)
        except OSError as error:
            raise self._unwritable(error) from error

    def nbytes(self) -> int:
        """Return the bytes of all samples that are there."""
        paths = map(self._path, range(len(self.names)))
        return sum(path.stat().st_size for path in paths if path.exists())

    def check_room(self, size: int) -> None:
        """Raise a SegFitError if the disk has no room for `size` bytes, or the folder cannot be made."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.folder).free
        except OSError as error:
            raise self._unwritable(error) from error
        if size + _DISK_RESERVE > free:
            raise SegFitError(
                f"{self.folder}: the samples need about {size / GIB:.1f} GiB decoded (data.cache=disk), but "
                f"{free / GIB:.1f} GiB are free there. {_ELSEWHERE}"
            )

    def _path(self, index: int) -> Path:
        name = self.names[index]
        return self.folder / name[:2] / name

    def _header(self, index: int, content: NDArray[np.uint8]) -> bytes:
        checksum = zlib.crc32(content[_HEADER.size :].data)
        return _HEADER.pack(_MAGIC, self.names[index].encode(), checksum)

    def _unwritable(self, error: OSError) -> SegFitError:
        return SegFitError(
            f"{self.folder}: cannot be written to ({error.strerror}), as data.cache=disk needs. What was written stays and is "
            f"used next time. {_ELSEWHERE}"
        )


class MemoryFile:
    """Memory without a name in any file system: gone with its last process, however that ends.

    Containers keep /dev/shm small (Docker: 64 MiB), and what a killed run leaves in it stays until the machine
    restarts. Only Linux has this.
    """

    def __init__(self, size: int) -> None:
        descriptor = os.memfd_create("segfit-cache")
        os.ftruncate(descriptor, size)
        # Children open it by the owner's descriptor, started by fork or spawn.
        weakref.finalize(self, os.close, descriptor)
        self.__setstate__((f"/proc/{os.getpid()}/fd/{descriptor}", size))

    def __getstate__(self) -> tuple[str, int]:
        return self._place

    def __setstate__(self, place: tuple[str, int]) -> None:
        self._place = path, size = place
        with Path(path).open("r+b") as file:
            self._content = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)

    def numpy(self) -> NDArray[np.uint8]:
        """Return all bytes, (size,) uint8, as a tensor would."""
        return self._content


class RamStore:
    """Samples in shared memory, decoded again by every run."""

    def __init__(self, length: int) -> None:
        self.blocks: list[MemoryFile | torch.Tensor] = []  # pickled by their places, not contents
        self.places = np.full((length, 3), -1, np.int64)  # block (-1: none), first byte, bytes
        self._used = 0

    def missing(self) -> list[int]:
        """Return the samples that are not there yet."""
        return [index for index in range(len(self.places)) if not self.has(index)]

    def has(self, index: int) -> bool:
        """Return whether a sample is there."""
        return bool(self.places[index, 0] >= 0)

    def get(self, index: int) -> Arrays | None:
        """Return the arrays of a sample, read-only; None if they are not there."""
        block, start, size = self.places[index].tolist()
        if block < 0:
            return None
        content = self.blocks[block].numpy()[start : start + size]
        content.flags.writeable = False
        return unpack(content)

    def put(self, index: int, arrays: Arrays) -> None:
        """Keep a sample, unseen by workers that were started before; raise a SegFitError if memory runs out."""
        packed = pack(arrays)
        if not self.blocks or self._used + len(packed) > len(self.blocks[-1].numpy()):
            size = max(len(packed), _BLOCK)
            self.check_room(size, "the next samples need")
            if hasattr(os, "memfd_create"):
                self.blocks.append(MemoryFile(size))
            else:
                self.blocks.append(torch.empty(size, dtype=torch.uint8).share_memory_())
            self._used = 0
        self.blocks[-1].numpy()[self._used : self._used + len(packed)] = packed
        self.places[index] = len(self.blocks) - 1, self._used, len(packed)
        self._used += len(packed)

    def nbytes(self) -> int:
        """Return the bytes of all samples."""
        return int(self.places[self.places[:, 0] >= 0, 2].sum())

    def check_room(self, size: int, what: str = "the samples need about") -> None:
        """Raise a SegFitError if `size` bytes are not free, besides what the training needs."""
        free = free_memory()
        if size + _MEMORY_RESERVE > free:
            raise SegFitError(
                f"data.cache=ram: {what} {size / GIB:.1f} GiB decoded, but {free / GIB:.1f} GiB of memory are free, "
                f"of which the training needs {_MEMORY_RESERVE / GIB:.0f} GiB at least. Set data.cache=disk, or none."
            )
