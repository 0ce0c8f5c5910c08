"""Masks as one file a part, as CelebAMask-HQ ships them.

`<image>_<part>.png`, anywhere below one folder; white where the part is. The masks are 512 pixels wide
and the images 1024: images are resized to their masks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from segfit.errors import SegFitError
from segfit.tasks.segmentation.data.masks import MaskReader, read_index_mask


@dataclass(frozen=True)
class PartMasks(MaskReader):
    """Masks painted part by part; class 0 where no part is, later classes over earlier ones."""

    # relative image name without suffix → (class index, file), one at least, in the order of the classes
    parts: Mapping[str, Sequence[tuple[int, Path]]]
    resizes_images: ClassVar[bool] = True

    def files(self, name: str) -> list[Path]:
        """Return the files of all parts."""
        return [path for _, path in self.parts[name]]

    def read(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:  # noqa: ARG002
        """Return class indices (H, W) at the size of the part files, whatever `size` is.

        Raises:
            SegFitError: if a part is unreadable, or of another size than the first one.
        """
        files = self.parts[name]
        parts = [read_index_mask(path) for _, path in files]
        mask: NDArray[np.uint8] = np.zeros(parts[0].shape, np.uint8)
        for (label, path), part in zip(files, parts, strict=True):
            if part.shape != mask.shape:
                raise SegFitError(
                    f"{path}: {part.shape[1]}×{part.shape[0]} pixels, but {files[0][1].name} has "
                    f"{mask.shape[1]}×{mask.shape[0]}. All parts of an image need one size."
                )
            mask[part != 0] = label
        return mask


def image_key(stem: str) -> str:
    """Return what an image and its parts share: numbers without leading zeros, other stems as is."""
    return str(int(stem)) if stem.isascii() and stem.isdigit() else stem


def find_parts(
    files: Iterable[Path], class_names: Sequence[str]
) -> tuple[dict[str, list[tuple[int, Path]]], Counter[str]]:
    """Return image key → (class index, file), and part name → number of files of parts that are no class.

    Class 0 is the background and has no files.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    others: Counter[str] = Counter()
    # Longest first: "00000_l_eye" is part l_eye, not part eye of image 00000_l.
    names = sorted(enumerate(class_names[1:], 1), key=lambda item: -len(item[1]))
    for path in sorted(files):
        for label, name in names:
            if path.stem.endswith("_" + name):
                key = image_key(path.stem[: -len(name) - 1])
                found.setdefault(key, []).append((label, path))
                break
        else:
            others[path.stem.partition("_")[2] or path.stem] += 1
    return {key: sorted(parts) for key, parts in found.items()}, others
