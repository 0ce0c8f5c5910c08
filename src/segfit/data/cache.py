"""Decoded images, kept: after the first time no epoch opens an image file.

What is kept is what a sample starts from: where every image is first fitted to one size (`stretch`, `pad`), the
fitted one, which saves the resizing too and most of the space of large pictures; else (`crop`) the image as it
was read. Batches are the same, bit for bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np

from segfit.data.cache_disk import DiskStore
from segfit.data.cache_ram import RamStore
from segfit.data.source import Image, Mask, Source
from segfit.tasks.segmentation.data.dataset import fit_image, fit_pair, read_pair

Store: TypeAlias = DiskStore | RamStore


class _Wrapped:
    """What a source of another source's items has in common with it.

    Args:
        source: whose items they are.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.classes = source.classes

    def __len__(self) -> int:
        return len(self.source)

    def id(self, index: int) -> str:
        """Return the source's name of the image."""
        return self.source.id(index)

    def files(self, index: int) -> list[Path]:
        """Return the source's files."""
        return self.source.files(index)


class FittedSource(_Wrapped):
    """A `Source` whose images are fitted to one size already: fitting them again changes nothing.

    Args:
        source: where they come from.
        size: (h, w) in pixels.
        fit: "stretch" or "pad".
        whole_masks: masks keep their original size, as `EvalDataset` needs them; else they are fitted too.
    """

    def __init__(
        self, source: Source, size: tuple[int, int], fit: str, *, whole_masks: bool = False
    ) -> None:
        super().__init__(source)
        self.size, self.fit, self.whole_masks = size, fit, whole_masks

    def read(self, index: int) -> tuple[Image, Mask]:
        """Return the image (h, w, 3) uint8, and its mask, (h, w) or as it was, uint8.

        Raises:
            SegFitError: if a file cannot be read; it is named.
        """
        image, mask = read_pair(self.source, index)
        if self.whole_masks:
            image, _ = fit_image(image, self.size, self.fit)
        else:
            image, mask = fit_pair(image, mask, self.size, self.fit)
        return np.ascontiguousarray(image.permute(1, 2, 0).numpy()), mask.contiguous().numpy()


class CachedSource(_Wrapped):
    """A `Source` that reads from a store.

    Args:
        source: asked for what the store has lost.
        store: holds the source's items by index.
    """

    def __init__(self, source: Source, store: Store) -> None:
        super().__init__(source)
        self.store = store

    def read(self, index: int) -> tuple[Image, Mask]:
        """Return what `source.read` does; the arrays may be read-only.

        Raises:
            SegFitError: if the store has lost the item and its files cannot be read.
        """
        found = self.store.get(index)
        if found is None:
            found = self.source.read(index)
            if isinstance(self.store, DiskStore):
                self.store.mend(index, *found)
        return found
