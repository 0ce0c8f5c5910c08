"""Images and masks in folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from segfit.data.images import Decoded, ImageReader, resize_image
from segfit.data.source import where
from segfit.data.splits import SplitRule, split_names
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.data.inspection import ItemReport
from segfit.tasks.segmentation.data.layout import Listing, find_layout, list_pairs
from segfit.tasks.segmentation.data.masks import ValueMap


class FolderSource:
    """A `Source` of image files with masks from a `MaskReader`.

    Args:
        classes: the classes.
        names: relative names without suffix, in the order of the indices.
        listing: where images and masks are, and what listing them found.
        values: what the mask's values mean.
        image_reader: how image files become RGB.
        options: everything that a report on an item depends on, as text.
    """

    def __init__(
        self,
        classes: Classes,
        names: Sequence[str],
        listing: Listing,
        values: ValueMap,
        image_reader: ImageReader,
        options: str,
    ) -> None:
        self.classes = classes
        self.names = list(names)
        self.images = [listing.images[name] for name in names]
        self.masks = listing.masks
        self.values = values
        self.image_reader = image_reader
        self.problems = tuple(listing.problems)
        self.notices = tuple(listing.notices)
        self.options = options

    def __len__(self) -> int:
        return len(self.names)

    def id(self, index: int) -> str:
        """Return the image's name relative to its folder, without suffix, with / between folders."""
        return self.names[index]

    def files(self, index: int) -> list[Path]:
        """Return the image file, then those of the mask."""
        return [self.images[index], *self.masks.files(self.names[index])]

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the image (H, W, 3) uint8 RGB and the mask (H, W) uint8.

        Raises:
            SegFitError: if a file is unreadable, sizes differ, or a mask value is no class.
        """
        decoded, values = self._read_files(index)
        image = decoded.pixels
        if image.shape[:2] != values.shape:
            raise SegFitError(f"{self.files(index)[1]}: {_sizes(image, values)}.")
        mask, unknown = self.values.apply(values) if self.masks.remaps else (values, [])
        if unknown:
            raise SegFitError(
                f"{self.files(index)[1]}: mask values {unknown[:16]} are no class "
                f"(data.num_classes={len(self.classes)}) and not ignored."
            )
        return image, mask

    def inspect(self, index: int) -> str:
        """Return `report(index)` as JSON, as it is remembered."""
        return self.report(index).to_json()

    def report(self, index: int) -> ItemReport:
        """Read an item and report; never raises for what is wrong with the files.

        Raises:
            SegFitError: if memory ran out.
        """
        try:
            (image, orientation, frames), values = self._read_files(index)
        except SegFitError as error:
            return ItemReport(unreadable=str(error))
        except MemoryError as error:  # no fault of the file's, and nothing to remember
            raise SegFitError(
                f"{where(self, index)}: memory ran out while this was read. Cut large images into tiles."
            ) from error
        if image.shape[:2] != values.shape:
            return ItemReport(size=_sizes(image, values), orientation=orientation, frames=frames)
        mask, unknown = self.values.apply(values) if self.masks.remaps else (values, [])
        counts = np.bincount(mask.ravel(), minlength=IGNORE_INDEX + 1)
        white = values == 255
        return ItemReport(
            values=unknown[:16],
            only_0_255=bool(white.any() and (white | (values == 0)).all()),
            orientation=orientation,
            frames=frames,
            pixels=counts[: len(self.classes)].tolist(),
            ignored=int(counts[IGNORE_INDEX]),
        )

    def _read_files(self, index: int) -> tuple[Decoded, NDArray[Any]]:
        decoded = self.image_reader.read(self.images[index])
        height, width = decoded.pixels.shape[:2]
        values = self.masks.read(self.names[index], (height, width))
        if self.masks.resizes_images and values.shape != (height, width):
            writable = np.require(decoded.pixels, requirements=["W"])
            tensor = torch.from_numpy(writable).permute(2, 0, 1)
            resized = resize_image(tensor, (values.shape[0], values.shape[1]))
            pixels = np.ascontiguousarray(resized.permute(1, 2, 0).numpy())
            decoded = decoded._replace(pixels=pixels)
        return decoded, values


def _sizes(image: NDArray[Any], mask: NDArray[Any]) -> str:
    return (
        f"image {image.shape[1]}×{image.shape[0]}, mask {mask.shape[1]}×{mask.shape[0]} "
        "(width × height)"
    )


def folder_sources(
    root: str | Path,
    *,
    classes: Classes,
    images: str = "images",
    masks: str = "masks",
    mask_format: str = "png",
    ignore_index: int | None = 255,
    label_map: Mapping[int, int] | None = None,
    image_mode: str = "rgb",
    intensity_window: tuple[float, float] | None = None,
    split: SplitRule | None = None,
) -> dict[str, FolderSource]:
    """Return the splits of a data set in folders: "train", "val" and perhaps "test".

    Layouts, in this order: `root/<split>/<images>` + `root/<split>/<masks>`; `root/<images>/<split>` +
    `root/<masks>/<split>`; `root/<images>` + `root/<masks>`, divided by `split`, as is the train folder
    where there is no val folder. An image and its mask have one relative name but for the suffix.

    Args:
        root: the folder of the data set.
        classes: what is predicted.
        images: folder of the images.
        masks: folder of the masks, or the CSV file of "rle".
        mask_format: "png" (index or palette files), "parts" (CelebAMask-HQ) or "rle" (UW-Madison).
        ignore_index: mask value that counts nowhere (format "png").
        label_map: mask value → class or `ignore_index` (format "png"); the rest is unknown.
        image_mode: "rgb" or "gray".
        intensity_window: percentiles of each image that become black and white ("gray").
        split: how images without folders of their own are divided; None: `SplitRule()`.

    Raises:
        SegFitError: with every problem that keeps the folders from being a data set. The pre-flight finds what is
            wrong with single files.
    """
    root = Path(root).expanduser()
    layout, problems = find_layout(root, images, masks, mask_format)
    listings: dict[str, Listing] = {}
    if not problems:
        for part, (image_folder, mask_path) in layout.items():
            try:
                listings[part] = list_pairs(image_folder, mask_path, mask_format, classes.names)
            except SegFitError as error:
                problems += error.problems
    if problems:
        raise SegFitError(list(dict.fromkeys(problems)))
    values = ValueMap(len(classes), ignore_index, label_map)
    options = repr(
        (classes.names, mask_format, ignore_index, label_map and sorted(label_map.items()))
    )
    reader = ImageReader(image_mode, intensity_window)
    return {
        part: FolderSource(classes, names, listing, values, reader, options)
        for part, (names, listing) in _divide(listings, split or SplitRule()).items()
    }


def _divide(
    listings: Mapping[str, Listing], rule: SplitRule
) -> dict[str, tuple[list[str], Listing]]:
    """Return split → names and where they are listed: train gives what has no folder of its own."""
    whole = listings.get("", listings.get("train"))
    assert whole is not None  # as find_layout made sure
    own = {part: listings[part] for part in ("val", "test") if part in listings}
    shares = {part: 0.0 if part in own else getattr(rule, part) for part in ("val", "test")}
    rule = replace(rule, val=shares["val"], test=shares["test"])
    divided = {"train": sorted(whole.images)}
    if rule.val or rule.test:
        divided = split_names(divided["train"], rule)
    members = {part: (names, whole) for part, names in divided.items()}
    return members | {part: (sorted(found.images), found) for part, found in own.items()}
