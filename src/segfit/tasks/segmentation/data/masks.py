"""Mask files → class indices, and what their values mean."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile
from torch.nn.functional import interpolate

from segfit.data.images import count_frames, open_image, upright
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
UNKNOWN = -1
MOST_SIDES = 33  # pixels
# Pillow's raw mode of grey values of 2 and 4 bits → what it multiplies them by
_SHALLOW = {"L;2": 85, "L;4": 17}


class MaskReader(ABC):
    """Where masks come from, by image name (relative, without suffix): a file, one a part, or a table of run-lengths."""

    resizes_images: ClassVar[bool] = False  # whether images are resized to their masks

    @abstractmethod
    def files(self, name: str) -> list[Path]:
        """Return the files that hold the mask of an image."""

    @abstractmethod
    def read(self, name: str, size: tuple[int, int]) -> NDArray[Any]:
        """Return the mask (H, W) of integers of an image of `size` (H, W); raise a SegFitError if it is unreadable."""


def read_index_mask(path: Path) -> NDArray[Any]:
    """Return the values (H, W) of a mask file: palette files by index, grey ones of 1, 2, 4, 8 or 16 bits.

    An EXIF orientation is applied, as to images.

    Raises:
        SegFitError: if the file is unreadable, coloured, or holds several frames: then no value is an index.
    """
    with open_image(path) as image:
        frames = count_frames(image)
        if frames > 1:
            raise SegFitError(
                f"{path}: holds {frames} frames; a mask has one. Save the right one as an 8-bit grey PNG."
            )
        return np.ascontiguousarray(upright(_values(image, path), image)[0])


def _values(image: Image.Image, path: Path) -> NDArray[Any]:
    """Return the values (H, W) of an open mask file, not yet upright."""
    mode, raw = image.mode, _raw_mode(image)
    if mode == "1":
        return np.asarray(image).astype(np.uint8)
    if mode == "L" and raw in _SHALLOW:  # Pillow stretches them to 0 … 255
        return np.asarray(image) // _SHALLOW[raw]
    if mode in ("P", "L", "I") or mode.startswith("I;16"):
        return np.asarray(image)
    if ";16" in raw:  # Pillow keeps the upper 8 bits alone: every index would be 0
        raise SegFitError(
            f"{path}: a mask of 16 bits cannot have colours or transparency. Save it as an 8-bit grey PNG."
        )
    if mode in ("LA", "PA"):
        return np.asarray(image)[..., 0]
    if mode in ("RGB", "RGBA"):
        values = np.asarray(image)[..., :3]
        if (values == values[..., :1]).all():
            return values[..., 0]
        colors = len(np.unique(values.reshape(-1, 3), axis=0))
        raise SegFitError(
            f"{path}: a colour picture ({colors} colours), not a mask of class indices. Save one "
            "index a pixel: an 8-bit grey or palette PNG."
        )
    raise SegFitError(f"{path}: a mask cannot be of mode {mode}. Save it as an 8-bit grey PNG.")


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of how a file that is not loaded yet packs its pixels, "" where there is none."""
    arguments = image.tile[0].args if isinstance(image, ImageFile) and image.tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


@dataclass(frozen=True)
class FolderMasks(MaskReader):
    """One mask file an image, with the same relative name."""

    paths: Mapping[str, Path]  # by relative name without suffix

    def files(self, name: str) -> list[Path]:
        """Return the one file."""
        return [self.paths[name]]

    def read(self, name: str, size: tuple[int, int]) -> NDArray[Any]:  # noqa: ARG002
        """Return `read_index_mask` of the file, whatever `size` is."""
        return read_index_mask(self.paths[name])


@dataclass(frozen=True)
class PartMasks(MaskReader):
    """Masks as one file a part, as CelebAMask-HQ ships them; class 0 where no part is, later classes over earlier ones.

    `<image>_<part>.png`, anywhere below one folder; white where the part is. The masks are 512 pixels wide
    and the images 1024: images are resized to their masks.
    """

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
    labels = {name: label for label, name in enumerate(class_names[1:], 1)}
    # The shortest image: "00000_l_eye" is part l_eye, not part eye of image 00000_l.
    pattern = re.compile(rf"(.*?)_({'|'.join(map(re.escape, labels))})", re.DOTALL)
    for path in sorted(files):
        if match := pattern.fullmatch(path.stem):
            found.setdefault(image_key(match[1]), []).append((labels[match[2]], path))
        else:
            others[path.stem.partition("_")[2] or path.stem] += 1
    return {key: sorted(parts) for key, parts in found.items()}, others


class ValueMap:
    """The file's values → class indices and `IGNORE_INDEX`.

    A value that `label_map` names becomes the class that it says, or ignored if that is none; else `ignore_index` is
    ignored; else, without a `label_map`, a value below `num_classes` (2-255) is a class. Everything else is unknown.
    """

    def __init__(
        self, num_classes: int, ignore_index: int | None, label_map: Mapping[int, int] | None
    ) -> None:
        self.label_map = label_map
        self.table = np.full(2 * 65536, UNKNOWN, np.int16)  # values below 0 are its second half
        if label_map is None:
            self.table[:num_classes] = np.arange(num_classes)
        if ignore_index is not None:
            self.table[ignore_index] = IGNORE_INDEX
        for value, target in (label_map or {}).items():
            self.table[value] = target if 0 <= target < num_classes else IGNORE_INDEX

    def apply(self, values: NDArray[Any]) -> tuple[NDArray[np.uint8], list[int]]:
        """Return the mask (H, W) uint8, unknown values ignored, and the unknown values, sorted."""
        if values.dtype.itemsize > 2:
            mapped = self.table[np.clip(values.astype(np.int64), -65536, 65535)]
            mapped[(values < -65536) | (values > 65535)] = UNKNOWN
        else:
            mapped = self.table[values]
        unknown: list[int] = []
        if mapped.min(initial=0) < 0:
            unknown = np.unique(values[mapped < 0]).tolist()
            mapped[mapped < 0] = IGNORE_INDEX
        return mapped.astype(np.uint8), unknown


def resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return a uint8 mask (H, W) resized to `size` = (h, w) by nearest-exact: no new values."""
    if tuple(mask.shape) == tuple(size):
        return mask
    return interpolate(mask[None, None], tuple(size), mode="nearest-exact")[0, 0]


def object_sizes(mask: NDArray[np.uint8], num_classes: int, surroundings: int) -> list[list[int]]:
    """Return [class, height, width, count] of the bounding boxes of objects, connected pixels of a class, in a mask (H, W).

    Sides are counted up to `MOST_SIDES`. One class is left out, and so is a mask that no image_size makes much smaller.
    """
    from scipy import ndimage

    found: Counter[tuple[int, int, int]] = Counter()
    boxes = ndimage.find_objects(mask.astype(np.int32) + 1, num_classes)
    for label, box in enumerate(boxes if max(mask.shape) > 64 else []):
        if box is not None and label != surroundings:
            objects, _ = ndimage.label(mask[box] == label, np.ones((3, 3)))
            for place in ndimage.find_objects(objects):
                height, width = (min(side.stop - side.start, MOST_SIDES) for side in place)
                found[label, height, width] += 1
    return [[*size, count] for size, count in found.items()]
