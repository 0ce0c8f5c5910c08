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
from torch.nn.functional import interpolate

from segfit.data.formats import (
    ARRAY_SUFFIXES,
    count_frames,
    is_array,
    open_image,
    raw_mode,
    read_values,
    upright,
)
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", *ARRAY_SUFFIXES)
UNKNOWN = -1
MOST_SIDES = 33  # pixels
# Pillow's raw mode of grey values of 2 and 4 bits, but for its letters → what it multiplies them by
_SHALLOW = {"2": 85, "4": 17}


class MaskReader(ABC):
    """Where masks come from, by image name (relative, without suffix): a file, one a part, or a table of run-lengths."""

    resizes_images: ClassVar[bool] = False  # whether images are resized to their masks

    @abstractmethod
    def files(self, name: str) -> list[Path]:
        """Return the files that hold the mask of an image."""

    @abstractmethod
    def read(self, name: str, size: tuple[int, int]) -> NDArray[Any]:
        """Return the mask (H, W) of integers of an image of `size` (H, W); raise a SegFitError if it is unreadable."""

    def palette(self, name: str, values: NDArray[Any]) -> list[list[int]]:  # noqa: ARG002
        """Return index, R, G and B of what occurs in `values`, the mask of an image, if the file says how it looks."""
        return []


def read_index_mask(path: Path) -> NDArray[Any]:
    """Return the values (H, W) of a mask file: palette files by index, grey ones and arrays of any depth.

    An EXIF orientation is applied, as to images.

    Raises:
        SegFitError: if the file is unreadable, coloured, or holds several frames: then no value is an index.
    """
    if is_array(path):
        values = read_values(path).values
        return _whole(values[..., 0] if values.shape[2:] == (1,) else values, path)
    with open_image(path) as image:
        _check_frames(count_frames(image), path)
        return np.ascontiguousarray(upright(_values(image, path), image)[0])


def read_color_mask(path: Path) -> NDArray[np.int64]:
    """Return the colours (H, W) of a mask file as 0xRRGGBB; transparency is dropped. Raises as `read_index_mask`."""
    values, alpha, _, frames = read_values(path)
    _check_frames(frames, path)
    rgb = np.atleast_3d(values)[..., : -1 if alpha else None]
    if rgb.dtype != np.uint8 or rgb.shape[2] not in (1, 3):
        raise SegFitError(f"{path}: data.colors needs masks of 8 bits, grey or RGB.")
    codes: NDArray[np.int64] = np.broadcast_to(rgb, (*rgb.shape[:2], 3)) @ [2**16, 2**8, 1]
    return codes


def _check_frames(frames: int, path: Path) -> None:
    if frames > 1:
        raise SegFitError(
            f"{path}: holds {frames} frames; a mask has one. Save the right one as an 8-bit grey PNG."
        )


def _values(image: Image.Image, path: Path) -> NDArray[Any]:
    """Return the values (H, W) of an open mask file, not yet upright."""
    mode, raw = image.mode, raw_mode(image)
    if mode == "1":
        return np.asarray(image).astype(np.uint8)
    if mode == "L":
        packing = raw.partition(";")[2]
        values = np.asarray(image)
        # Pillow turns what is white at zero, and stretches few bits to 0 … 255.
        values = 255 - values if "I" in packing else values
        return values // np.uint8(_SHALLOW.get(packing.strip("IR"), 1))
    if mode == "F":
        return _whole(np.asarray(image), path)
    if mode in ("P", "I") or mode.startswith("I;16"):
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
        colors = np.unique(values.reshape(-1, 3), axis=0).tolist()
        raise SegFitError(
            f"{path}: a colour picture ({len(colors)} colours), not a mask of class indices. Save one index a pixel: an 8-bit "
            f"grey or palette PNG. Or list the colours in the order of the classes: 'data.colors={colors[:8]}'."
        )
    raise SegFitError(f"{path}: a mask cannot be of mode {mode}. Save it as an 8-bit grey PNG.")


def _whole(values: NDArray[Any], path: Path) -> NDArray[Any]:
    """Return the values (H, W) of a mask as integers."""
    if values.ndim == 2 and (np.rint(values) == values).all():  # not-a-number never is
        return values.astype(np.int64)
    what = "numbers that are not whole" if values.ndim == 2 else f"{values.shape[2]} bands"
    raise SegFitError(f"{path}: holds {what}; a mask has one whole number a pixel.")


@dataclass(frozen=True)
class FolderMasks(MaskReader):
    """One mask file an image, with the same relative name."""

    paths: Mapping[str, Path]  # by relative name without suffix
    colors: bool = False  # values are colours, 0xRRGGBB, not indices

    def files(self, name: str) -> list[Path]:
        """Return the one file."""
        return [self.paths[name]]

    def read(self, name: str, size: tuple[int, int]) -> NDArray[Any]:  # noqa: ARG002
        """Return `read_index_mask` or `read_color_mask` of the file, whatever `size` is."""
        return (read_color_mask if self.colors else read_index_mask)(self.paths[name])

    def palette(self, name: str, values: NDArray[Any]) -> list[list[int]]:
        """Return the colours of a palette file, unless they are the greys that indices look like by themselves."""
        if self.colors or is_array(self.paths[name]):
            return []
        with open_image(self.paths[name]) as image:
            colors = image.getpalette() if image.mode == "P" else None
        colors = colors or []
        found = [
            [i, *colors[3 * i : 3 * i + 3]]
            for i in np.unique(values).tolist()[:64]
            if 3 * i < len(colors)
        ]
        return [] if all(entry[1:] == entry[:1] * 3 for entry in found) else found


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
    With `colors`, values are colours, 0xRRGGBB, and this is their map.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int | None,
        label_map: Mapping[int, int] | None,
        colors: Mapping[int, int] | None = None,
    ) -> None:
        self.label_map = label_map
        self.colors = np.array(sorted(colors)) if colors else None
        if colors:  # each stands for its place among them
            ignore_index = None
            label_map = {place: colors[code] for place, code in enumerate(sorted(colors))}
        self.table = np.full(2 * 65536, UNKNOWN, np.int16)  # values below 0 are its second half
        if label_map is None:
            self.table[:num_classes] = np.arange(num_classes)
        if ignore_index is not None:
            self.table[ignore_index] = IGNORE_INDEX
        for value, target in (label_map or {}).items():
            self.table[value] = target if 0 <= target < num_classes else IGNORE_INDEX

    def shown(self, values: Iterable[int]) -> list[Any]:
        """Return values as they are written in the config: numbers, or [R, G, B]."""
        if self.colors is None:
            return list(values)
        return [[code >> 16, code >> 8 & 255, code & 255] for code in values]

    def apply(self, values: NDArray[Any]) -> tuple[NDArray[np.uint8], list[int]]:
        """Return the mask (H, W) uint8, unknown values ignored, and the unknown values, sorted."""
        if self.colors is not None:
            places = np.searchsorted(self.colors, values).clip(max=len(self.colors) - 1)
            mapped = self.table[places]
            mapped[self.colors[places] != values] = UNKNOWN
        elif values.dtype.itemsize > 2:
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
