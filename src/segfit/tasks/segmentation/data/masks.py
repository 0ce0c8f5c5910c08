"""Mask files → class indices, and what their values mean."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from segfit.data.formats import ARRAY_SUFFIXES, open_image, read_values
from segfit.data.source import list_files, some
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.data.painted import paint

MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", *ARRAY_SUFFIXES)
UNKNOWN = -1
MOST_SIDES = 33  # pixels
_BLENDED = 4  # times as many colours as classes: from there on they are mixed


@dataclass(frozen=True)
class Masks:
    """The masks of images, by their relative names without suffix."""

    form: str  # data.mask_format, or "colors" for files whose values are colours
    # a file; the (class, file) of each part, in the order of the classes; or what `place` says of the image
    entries: Mapping[str, Any]
    place: Path  # the folder, or the file of all masks
    class_names: Sequence[str]

    def files(self, name: str) -> list[Path]:
        """Return the files that hold the mask of an image."""
        entry = self.entries[name]
        if self.form == "parts":
            return [path for _, path in entry]
        return [entry if isinstance(entry, Path) else self.place]

    def read(self, name: str, size: tuple[int, int]) -> NDArray[Any]:
        """Return the mask (H, W) of integers of an image of `size` (H, W), which parts and files need not have.

        Raises a SegFitError if a file is unreadable or damaged, or was not made for this image.
        """
        entry = self.entries[name]
        if self.form == "png":
            return read_index_mask(entry, len(self.class_names))
        if self.form == "colors":
            return read_color_mask(entry)
        if self.form == "parts":
            return _read_parts(entry)
        return paint(self.form, self.files(name)[0], entry, self.class_names, size)

    def hides(self, name: str, values: NDArray[Any]) -> bool:
        """Say whether `values`, the mask of an image, are one value where its file's transparency, which is dropped, is several."""
        if self.form not in ("png", "colors") or name not in self.entries or np.ptp(values):
            return False
        if self.entries[name].suffix.lower() in ARRAY_SUFFIXES:
            return False
        mode = "rgb" if self.form == "colors" else "index"
        alpha = read_values(self.entries[name], mode).alpha
        return alpha is not None and bool(np.ptp(alpha))

    def palette(self, name: str, values: NDArray[Any]) -> list[list[int]]:
        """Return index, R, G and B of what occurs in `values`, the mask of an image, if its file says how it looks.

        Greys that indices look like by themselves say nothing.
        """
        colors: list[int] = []
        if self.form == "png" and self.entries[name].suffix.lower() in MASK_SUFFIXES[:4]:
            with suppress(SegFitError), open_image(self.entries[name]) as image:
                colors = image.getpalette() or []
        present = [i for i in np.unique(values).tolist()[:64] if 0 <= 3 * i < len(colors)]
        found = [[i, *colors[3 * i : 3 * i + 3]] for i in present]
        return [] if all(entry[1:] == entry[:1] * 3 for entry in found) else found


def read_index_mask(path: Path, num_classes: int = 8) -> NDArray[Any]:
    """Return the values (H, W) of a mask file: palette files by index, grey ones and arrays of any depth.

    An EXIF orientation is applied, as to images. Raises a SegFitError if the file is unreadable, coloured, or holds several
    frames: then no value is an index.
    """
    values = _read(path, "index")
    if values.shape[2:] == (3,) and (values != values[..., :1]).any():
        found, counts = np.unique(values.reshape(-1, 3), axis=0, return_counts=True)
        colors = found.tolist()
        listed, blended, which = colors[:8], "", "the colours"
        if len(colors) > _BLENDED * num_classes:
            listed = found[np.argsort(-counts, kind="stable")[:num_classes]].tolist()
            blended = " Edges are blended, by smoothing or JPEG: make the masks anew without (nearest neighbour, PNG)."
            which = "their colours, perhaps these, the most frequent,"
        raise SegFitError(
            f"{path}: a colour picture ({len(colors)} colours), not a mask of class indices.{blended} Save one index a pixel: an "
            f"8-bit grey or palette PNG. Or list {which} in the order of the classes: 'data.colors={listed}'."
        )
    if values.shape[2:] not in ((), (1,), (3,)):
        raise SegFitError(f"{path}: holds {values.shape[2]} bands; a mask has one number a pixel.")
    values = values.reshape(*values.shape[:2], -1)[..., 0]
    if values.dtype.kind in "bf":
        if (np.rint(values) != values).any():  # not-a-number always is
            raise SegFitError(
                f"{path}: holds numbers that are not whole; a mask has one whole number a pixel."
            )
        values = values.astype(np.int64)
    return np.ascontiguousarray(values)


def read_color_mask(path: Path) -> NDArray[np.int64]:
    """Return the colours (H, W) of a mask file as 0xRRGGBB; transparency is dropped. Raises as `read_index_mask`."""
    rgb = np.atleast_3d(_read(path, "rgb"))
    if rgb.dtype != np.uint8 or rgb.shape[2] not in (1, 3):
        raise SegFitError(f"{path}: data.colors needs masks of 8 bits, grey or RGB.")
    codes: NDArray[np.int64] = np.broadcast_to(rgb, (*rgb.shape[:2], 3)) @ [2**16, 2**8, 1]
    return codes


def _read(path: Path, mode: str) -> NDArray[Any]:
    """Return what a file holds besides transparency, (H, W) or (H, W, C)."""
    values, _, _, frames = read_values(path, mode)
    if frames > 1:
        raise SegFitError(
            f"{path}: holds {frames} frames; a mask has one. Save the right one as an 8-bit grey PNG."
        )
    return values


def _read_parts(files: Sequence[tuple[int, Path]]) -> NDArray[np.uint8]:
    """Return class indices (H, W) of (class, file) of each part: 0 where no part is, later classes over earlier ones."""
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
    folder: Path, class_names: Sequence[str]
) -> tuple[dict[str, list[tuple[int, Path]]], list[str]]:
    """Return image key → (class index, file), and a notice if there are parts that are no class.

    Parts are `<image>_<part>.png`, anywhere below one folder, white where the part is, as CelebAMask-HQ ships them. Class 0
    is the background and has no files.
    """
    found: dict[str, list[tuple[int, Path]]] = {}
    others: Counter[str] = Counter()
    labels = {name: label for label, name in enumerate(class_names[1:], 1)}
    # The shortest image: "00000_l_eye" is part l_eye, not part eye of image 00000_l.
    pattern = re.compile(rf"(.*?)_({'|'.join(map(re.escape, labels))})", re.DOTALL)
    for path in list_files(folder, MASK_SUFFIXES):
        if match := pattern.fullmatch(path.stem):
            found.setdefault(image_key(match[1]), []).append((labels[match[2]], path))
        else:
            others[path.stem.partition("_")[2] or path.stem] += 1
    names = [f"{part} ({count} files)" for part, count in sorted(others.items())]
    notice = f"{folder}: parts that are none of data.class_names count as {class_names[0]}: {some(names, 20)}."
    return {key: sorted(parts) for key, parts in found.items()}, [notice] if others else []


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
        self.label_map, self.colors = label_map, colors
        meaning = {} if label_map or colors else {value: value for value in range(num_classes)}
        if ignore_index is not None and not colors:
            meaning[ignore_index] = IGNORE_INDEX
        for value, target in (colors or label_map or {}).items():
            meaning[value] = target if 0 <= target < num_classes else IGNORE_INDEX
        self.known = np.array(sorted(meaning))
        self.targets = np.array([meaning[value] for value in sorted(meaning)], np.int16)
        self._bytes = self._mapped(np.arange(256))

    def _mapped(self, values: NDArray[Any]) -> NDArray[np.int16]:
        """Return class indices, and `UNKNOWN` for unknown values."""
        places = np.searchsorted(self.known, values).clip(max=len(self.known) - 1)
        return np.where(self.known[places] == values, self.targets[places], np.int16(UNKNOWN))

    def shown(self, values: Iterable[int]) -> list[Any]:
        """Return values as they are written in the config: numbers, or [R, G, B]."""
        if not self.colors:
            return list(values)
        return [[code >> 16, code >> 8 & 255, code & 255] for code in values]

    def apply(self, values: NDArray[Any]) -> tuple[NDArray[np.uint8], list[int]]:
        """Return the mask (H, W) uint8, unknown values ignored, and the unknown values, sorted."""
        mapped = self._bytes[values] if values.dtype == np.uint8 else self._mapped(values)
        unknown: list[int] = []
        if mapped.min(initial=0) < 0:
            unknown = np.unique(values[mapped < 0]).tolist()
            mapped[mapped < 0] = IGNORE_INDEX
        return mapped.astype(np.uint8), unknown


def resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return uint8 masks (H, W) or (B, H, W) resized to `size` = (h, w) by nearest-exact: no new values."""
    *many, height, width = mask.shape
    if (height, width) == tuple(size):
        return mask
    planes = mask.view(1, -1, height, width)
    return interpolate(planes, tuple(size), mode="nearest-exact").view(*many, *size)


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
