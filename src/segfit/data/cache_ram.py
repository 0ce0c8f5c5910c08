"""Decoded images and masks in memory that this process and its workers share."""

from __future__ import annotations

import mmap
import os
import weakref
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.data.source import Image, Mask
from segfit.errors import SegFitError
from segfit.system.cores import free_memory

_GIB = 1 << 30
_RESERVE = _GIB  # bytes that stay free for the training itself
_BLOCK = 64 << 20  # bytes that are taken at once


class Block(Protocol):
    """Shared memory; picklable by its place, not its content."""

    content: NDArray[np.uint8]


class MemoryFile:
    """Memory without a name in any file system: gone with its last process, however that ends.

    /dev/shm would do too, but containers keep it small (Docker: 64 MiB), and what a killed run leaves in it
    stays until the machine restarts. Linux alone has this.
    """

    def __init__(self, size: int) -> None:
        descriptor = os.memfd_create("segfit-cache")
        os.ftruncate(descriptor, size)
        # Children open it by the owner's descriptor, started by fork or spawn.
        self._path, self._size = f"/proc/{os.getpid()}/fd/{descriptor}", size
        weakref.finalize(self, os.close, descriptor)
        self._map(descriptor)

    def _map(self, descriptor: int) -> None:
        self.content = np.frombuffer(mmap.mmap(descriptor, self._size), np.uint8)

    def __getstate__(self) -> tuple[str, int]:
        return self._path, self._size

    def __setstate__(self, state: tuple[str, int]) -> None:
        self._path, self._size = state
        descriptor = os.open(self._path, os.O_RDWR)
        try:
            self._map(descriptor)
        finally:
            os.close(descriptor)


class SharedTensor:
    """A tensor in torch's shared memory, for systems without `MemoryFile`."""

    def __init__(self, size: int) -> None:
        self._tensor: torch.Tensor = torch.empty(size, dtype=torch.uint8).share_memory_()
        self.content = self._tensor.numpy()

    def __getstate__(self) -> tuple[torch.Tensor]:
        return (self._tensor,)

    def __setstate__(self, state: tuple[torch.Tensor]) -> None:
        (self._tensor,) = state
        self.content = self._tensor.numpy()


def make_block(size: int) -> Block:
    """Return `size` bytes of shared memory.

    Raises:
        SegFitError: if they are not free.
    """
    check_room(size, "the next images need")
    return MemoryFile(size) if hasattr(os, "memfd_create") else SharedTensor(size)


def check_room(size: int, what: str) -> None:
    """Raise a SegFitError if `size` bytes are not free, besides what the training needs."""
    free = free_memory()
    if size + _RESERVE > free:
        raise SegFitError(
            f"data.cache=ram: {what} {size / _GIB:.1f} GiB decoded, but {free / _GIB:.1f} GiB of memory are free, "
            f"of which the training needs {_RESERVE / _GIB:.0f} GiB at least. Set data.cache=disk, or none."
        )


class RamStore:
    """Items in shared memory, made anew by every run.

    Args:
        length: number of items.
    """

    def __init__(self, length: int) -> None:
        self.blocks: list[Block] = []
        # block (-1: none), offset, image height and width, mask height and width
        self.places = np.full((length, 6), -1, np.int64)
        self._used = 0

    def missing(self) -> list[int]:
        """Return the items that are not there yet."""
        return [int(index) for index in np.flatnonzero(self._absent())]

    def has(self, index: int) -> bool:
        """Say whether an item is there."""
        return bool(self.places[index, 0] >= 0)

    def get(self, index: int) -> tuple[Image, Mask] | None:
        """Return image (H, W, 3) and mask (h, w), both uint8 and read-only; None: not there."""
        block, start, height, width, mask_height, mask_width = self.places[index].tolist()
        if block < 0:
            return None
        content = self.blocks[block].content
        middle = start + 3 * height * width
        image = content[start:middle].reshape(height, width, 3)
        mask = content[middle : middle + mask_height * mask_width].reshape(mask_height, mask_width)
        image.flags.writeable = mask.flags.writeable = False
        return image, mask

    def put(self, index: int, image: Image, mask: Mask) -> None:
        """Keep an item; only before workers were started: what is put later, they do not see.

        Raises:
            SegFitError: if memory runs out.
        """
        size = image.size + mask.size
        if not self.blocks or self._used + size > len(self.blocks[-1].content):
            self.blocks.append(make_block(max(size, _BLOCK)))
            self._used = 0
        content, middle = self.blocks[-1].content, self._used + image.size
        content[self._used : middle] = image.reshape(-1)
        content[middle : self._used + size] = mask.reshape(-1)
        self.places[index] = (
            len(self.blocks) - 1, self._used, *image.shape[:2], *mask.shape,
        )  # fmt: skip
        self._used += size

    def nbytes(self) -> int:
        """Return the bytes of all items."""
        _, _, height, width, mask_height, mask_width = self.places[~self._absent()].T
        return int((3 * height * width + mask_height * mask_width).sum())

    def check_room(self, size: int) -> None:
        """Raise a SegFitError if there is no memory for `size` bytes."""
        check_room(size, "the images need about")

    def _absent(self) -> NDArray[np.bool_]:
        return np.asarray(self.places[:, 0] < 0)
