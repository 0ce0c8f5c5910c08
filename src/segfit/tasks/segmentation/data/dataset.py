"""Sources → samples of one size."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad
from torch.utils.data import Dataset

from segfit.data.files import list_files, relative_name
from segfit.data.images import IMAGE_SUFFIXES, ImageReader, resize_image
from segfit.data.source import Source, read_arrays, where
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.data.masks import resize_mask

Image: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.uint8]
Sample: TypeAlias = dict[str, Any]
# (image (3, h, w) uint8, mask (h, w) uint8, seed=int) → the same
Augment: TypeAlias = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class LabelledSource(Source, Protocol):
    """Images with masks, and what the mask values mean."""

    classes: Classes

    def read(self, index: int) -> tuple[Image, Mask]:
        """Return an image (H, W, 3) uint8 RGB and its mask (H, W) uint8.

        The mask holds class indices 0 … len(classes) - 1 and `IGNORE_INDEX`.

        Raises:
            SegFitError: if a file is unreadable or its values are none of the classes.
        """


class _PairDataset(Dataset[Sample]):
    """Samples of a source's pairs, fitted to one size."""

    def __init__(self, source: Source, size: tuple[int, int], fit: str) -> None:
        self.source, self.size, self.fit = source, size, fit

    def __len__(self) -> int:
        return len(self.source)

    def where(self, index: int) -> str:
        """Return the files behind an image, for messages."""
        return where(self.source, index)


class TrainDataset(_PairDataset):
    """Samples of one size for training.

    Args:
        source: where images and masks come from.
        size: (h, w) in pixels of every sample.
        fit: "stretch" resizes to `size`; "pad" resizes to fit inside, centred, and fills up with black
            that is ignored; "crop" cuts a random window out, and fills up where the image is smaller.
        augment: called with image, mask and `seed=`; None: nothing.
    """

    def __init__(
        self, source: Source, size: tuple[int, int], fit: str, augment: Augment | None = None
    ) -> None:
        super().__init__(source, size, fit)
        self.augment = augment

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the sample for (index, seed); the seed decides everything that is random.

        Returns:
            "image": (3, h, w) uint8 RGB, "mask": (h, w) uint8, "index": int.

        Raises:
            SegFitError: if a file cannot be read; it is named.
        """
        index, seed = key
        image, mask = read_pair(self.source, index)
        if self.fit == "crop":
            image, mask = random_crop(image, mask, self.size, seed)
        else:
            image, mask = fit_pair(image, mask, self.size, self.fit)
        if self.augment is not None:
            image, mask = self.augment(image, mask, seed=seed)
        return {"image": image.contiguous(), "mask": mask.contiguous(), "index": index}


class EvalDataset(_PairDataset):
    """Samples for evaluation: images fitted to `size`, masks at their original size.

    Args:
        source: where images and masks come from.
        size: (h, w) in pixels that the model sees.
        fit: "stretch" or "pad" as in training; "crop" leaves the image untouched, for a sliding window.
    """

    def __getitem__(self, index: int) -> Sample:
        """Return an image and its whole mask.

        Returns:
            "image": (3, h', w') uint8 RGB; "mask": (H, W) uint8; "content": (4,) int64, top, left,
            height and width of the picture inside the image; "index": int.

        Raises:
            SegFitError: if a file cannot be read; it is named.
        """
        image, mask = read_pair(self.source, index)
        # The mask has the original size: an image from a cache may be fitted already.
        content = place_image(mask.shape[0], mask.shape[1], self.size, self.fit)
        return {
            "image": fit_image(image, self.size, self.fit)[0].contiguous(),
            "mask": mask,
            "content": torch.tensor(content),
            "index": index,
        }


class PredictDataset(Dataset[Sample]):
    """Images of a folder (and the folders below it), without masks.

    Args:
        folder: where the images are.
        size: (h, w) in pixels that the model sees.
        fit: as `EvalDataset`.
        image_mode: "rgb" or "gray", as in training.
        intensity_window: percentiles of "gray", as in training.

    Raises:
        SegFitError: if there is no such folder or no image in it.
    """

    def __init__(
        self,
        folder: str | Path,
        size: tuple[int, int],
        fit: str,
        *,
        image_mode: str = "rgb",
        intensity_window: tuple[float, float] | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        if not self.folder.is_dir():
            raise SegFitError(f"images={folder}: no such folder.")
        paths = list_files(self.folder, IMAGE_SUFFIXES)
        if not paths:
            kinds = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
            raise SegFitError(f"images={folder}: no image in it ({kinds}).")
        self.size, self.fit = size, fit
        self.reader = ImageReader(image_mode, intensity_window)
        self.paths = paths
        names = [relative_name(path, self.folder) for path in paths]
        # a.jpg and a.png: the suffix goes into the name, so that no prediction overwrites another.
        count = Counter(names)
        self.names = [
            f"{name}_{path.suffix[1:]}" if count[name] > 1 else name
            for name, path in zip(names, paths, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.paths)

    def id(self, index: int) -> str:
        """Return a unique relative name without suffix, / between folders."""
        return self.names[index]

    def file(self, index: int) -> Path:
        """Return the image's file."""
        return self.paths[index]

    def where(self, index: int) -> str:
        """Return the image's file, for messages."""
        return str(self.paths[index])

    def __getitem__(self, index: int) -> Sample:
        """Return an image.

        Returns:
            "image" and "content" as `EvalDataset`; "shape": (2,) int64, the original H and W (upright);
            "index": int.

        Raises:
            SegFitError: if the file cannot be read; it is named.
        """
        pixels = self.reader(self.paths[index])
        image, content = fit_image(_tensor(pixels), self.size, self.fit)
        return {
            "image": image.contiguous(),
            "content": torch.tensor(content),
            "shape": torch.tensor(pixels.shape[:2]),
            "index": index,
        }


def place_image(
    height: int, width: int, size: tuple[int, int], fit: str
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a picture of height × width once it is fitted to `size`."""
    if fit == "crop":
        return 0, 0, height, width
    if fit == "stretch":
        return 0, 0, *size
    scale = min(size[0] / height, size[1] / width)
    inner = (
        min(size[0], max(1, round(height * scale))),
        min(size[1], max(1, round(width * scale))),
    )
    return (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2, *inner


def fit_image(
    image: torch.Tensor, size: tuple[int, int], fit: str
) -> tuple[torch.Tensor, tuple[int, int, int, int]]:
    """Return an image (3, H, W) uint8 fitted to `size`, and (top, left, height, width) of its picture.

    "crop" returns the image as it is, and so does any fit an image that was fitted before.
    """
    top, left, height, width = place_image(image.shape[-2], image.shape[-1], size, fit)
    content = (top, left, height, width)
    image = resize_image(image, (height, width))
    return image if fit == "crop" else _surround(image, size, top, left, 0), content


def fit_pair(
    image: torch.Tensor, mask: torch.Tensor, size: tuple[int, int], fit: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an image (3, H, W) and its mask (H, W), both uint8, fitted to `size` ("stretch", "pad")."""
    image, (top, left, height, width) = fit_image(image, size, fit)
    mask = resize_mask(mask, (height, width))
    return image, _surround(mask, size, top, left, IGNORE_INDEX)


def random_crop(
    image: torch.Tensor, mask: torch.Tensor, size: tuple[int, int], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a window of `size` = (h, w), drawn by the seed alone.

    Where the image is smaller, it is placed at random, in black that is ignored.
    """
    draw = random.Random(seed)
    for axis in (-2, -1):
        length, wanted = mask.shape[axis], size[axis]
        start = draw.randint(0, abs(length - wanted))
        if length > wanted:
            image, mask = image.narrow(axis, start, wanted), mask.narrow(axis, start, wanted)
        elif length < wanted:
            sides = (start, wanted - length - start)
            # torch lists the last axis first.
            margins = sides if axis == -1 else (0, 0, *sides)
            image, mask = pad(image, margins), pad(mask, margins, value=IGNORE_INDEX)
    return image, mask


def _surround(
    tensor: torch.Tensor, size: tuple[int, int], top: int, left: int, fill: int
) -> torch.Tensor:
    """Return (…, h, w) of `size`, with `tensor` at (top, left) and `fill` around it."""
    bottom, right = size[0] - tensor.shape[-2] - top, size[1] - tensor.shape[-1] - left
    if not (top or left or bottom or right):
        return tensor
    return pad(tensor, (left, right, top, bottom), value=fill)


def read_pair(source: Source, index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image (3, H, W) and mask (H, W), both uint8.

    Raises:
        SegFitError: whatever is wrong with the files; they are named.
        MemoryError: if memory ran out, which is no fault of theirs.
    """
    image, mask = read_arrays(source, index)
    return _tensor(image), torch.from_numpy(np.require(mask, requirements=["W"]))


def _tensor(pixels: Image | Mask) -> torch.Tensor:
    """Return (H, W, 3) as (3, H, W) without copying: channels-last memory, which resizing likes."""
    return torch.from_numpy(np.require(pixels, requirements=["W"])).permute(2, 0, 1)
