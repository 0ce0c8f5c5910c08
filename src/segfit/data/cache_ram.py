"""Samples in memory that this process and its workers share."""

from __future__ import annotations

import mmap
import os
import weakref
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.data.packing import pack, unpack
from segfit.data.source import Arrays
from segfit.errors import SegFitError
from segfit.system.cores import free_memory

_GIB = 1 << 30
_RESERVE = _GIB  # bytes that stay free for the training itself
_BLOCK = 64 << 20  # bytes that are taken at once


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
            self.content = np.frombuffer(mmap.mmap(file.fileno(), size), np.uint8)


class SharedTensor:
    """A tensor in torch's shared memory, for systems without `MemoryFile`."""

    def __init__(self, size: int) -> None:
        self._tensor: torch.Tensor = torch.empty(size, dtype=torch.uint8).share_memory_()

    @property
    def content(self) -> NDArray[np.uint8]:
        """All bytes, (size,) uint8."""
        return self._tensor.numpy()


Block: TypeAlias = MemoryFile | SharedTensor  # picklable by its place, not its content


class RamStore:
    """Samples in shared memory, decoded again by every run."""

    def __init__(self, length: int) -> None:
        self.blocks: list[Block] = []
        self.places = np.full((length, 3), -1, np.int64)  # block (-1: none), first byte, bytes
        self._used = 0

    def missing(self) -> list[int]:
        """Return the samples that are not there yet."""
        return [int(index) for index in np.flatnonzero(self.places[:, 0] < 0)]

    def has(self, index: int) -> bool:
        """Return whether a sample is there."""
        return bool(self.places[index, 0] >= 0)

    def get(self, index: int) -> Arrays | None:
        """Return the arrays of a sample, read-only; None if they are not there."""
        block, start, size = self.places[index].tolist()
        if block < 0:
            return None
        content = self.blocks[block].content[start : start + size]
        content.flags.writeable = False
        return unpack(content)

    def put(self, index: int, arrays: Arrays) -> None:
        """Keep a sample, unseen by workers that were started before; raise a SegFitError if memory runs out."""
        packed = pack(arrays)
        if not self.blocks or self._used + len(packed) > len(self.blocks[-1].content):
            size = max(len(packed), _BLOCK)
            self.check_room(size, "the next samples need")
            linux = hasattr(os, "memfd_create")
            self.blocks.append(MemoryFile(size) if linux else SharedTensor(size))
            self._used = 0
        self.blocks[-1].content[self._used : self._used + len(packed)] = packed
        self.places[index] = len(self.blocks) - 1, self._used, len(packed)
        self._used += len(packed)

    def nbytes(self) -> int:
        """Return the bytes of all samples."""
        return int(self.places[self.places[:, 0] >= 0, 2].sum())

    def check_room(self, size: int, what: str = "the samples need about") -> None:
        """Raise a SegFitError if `size` bytes are not free, besides what the training needs."""
        free = free_memory()
        if size + _RESERVE > free:
            raise SegFitError(
                f"data.cache=ram: {what} {size / _GIB:.1f} GiB decoded, but {free / _GIB:.1f} GiB of memory are free, "
                f"of which the training needs {_RESERVE / _GIB:.0f} GiB at least. Set data.cache=disk, or none."
            )
