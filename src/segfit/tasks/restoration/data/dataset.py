"""Sources → patches to train on, whole pictures to score or to restore."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from segfit.data.images import images_at
from segfit.data.source import Arrays, Source, SourceView, files_by_name
from segfit.errors import SegFitError, raise_all
from segfit.tasks.restoration.data.folder import PictureSource, Pixels, as_float, is_shallow

Sample: TypeAlias = dict[str, Any]
# (clean (H, W, C) float32 in [0, 1]) → degraded, the same each time, perhaps outside of [0, 1]
Degrade: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class TrainDataset(SourceView):
    """Patches of `patch_size` pixels a side of clean pictures, or pairs, at random places, in one of the eight turns and flips.

    The picture that was read last is kept: its patches come one after the other.
    """

    def __init__(self, source: Source, patch_size: int) -> None:
        super().__init__(source)
        self.patch_size = patch_size
        self._last: tuple[int, Arrays] | None = None

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return the patch for (index, seed); the seed decides everything that is random.

        "target" is (C, P, P) uint8 or uint16, of pairs "input", too; "index" and "seed", for what degrades, are int. Raises
        a SegFitError if a file cannot be read, or the picture is smaller than a patch.
        """
        index, seed = key
        if self._last is None or self._last[0] != index:
            self._last = index, self.source.read(index)
        pictures = self._last[1]
        height, width = pictures[0].shape[:2]
        size, draw = self.patch_size, random.Random(seed)
        if min(height, width) < size:
            raise SegFitError(
                f"{self.where(index)}: {width}×{height}, smaller than patch_size={size}. Lower it, or leave the picture out."
            )
        top, left = draw.randint(0, height - size), draw.randint(0, width - size)
        turns, flipped = draw.randrange(4), draw.randrange(2)
        sample: Sample = {"seed": seed, "index": index}
        for name, pixels in zip(("target", "input"), pictures, strict=False):
            patch = np.rot90(pixels[top : top + size, left : left + size], turns)
            sample[name] = _tensor(patch[:, ::-1] if flipped else patch)
        return sample


class HeldOutDataset(SourceView):
    """Whole pictures with their degraded partners; `degrade` makes those that are not there."""

    def __init__(self, source: Source, degrade: Degrade) -> None:
        super().__init__(source)
        self.degrade = degrade

    def __getitem__(self, index: int) -> Sample:
        """Return a picture: "input" (C, H, W) uint8 or uint16, or float32 where it was made, "target" uint8 or uint16, "index".

        Raises a SegFitError if a file cannot be read; it is named.
        """
        target, *degraded = self.source.read(index)
        given = degraded[0] if degraded else self.degrade(as_float(target))
        return {"input": _tensor(given), "target": _tensor(target), "index": index}


class PredictDataset(SourceView):
    """Degraded pictures of a folder (and the folders below it), or one file, without targets, in the `image_mode` of training.

    Raises a SegFitError if there is no such folder or no picture in it, or two have one name.
    """

    def __init__(self, folder: str | Path, image_mode: str) -> None:
        self.folder = Path(folder).expanduser()
        paths, base, self.notices = images_at(folder)
        named, problems = files_by_name(paths, base)
        raise_all(problems)
        super().__init__(PictureSource(image_mode, list(named), [named]))
        self.remarks: dict[int, str] = {}  # the values of pictures of 16 bits that use few of them

    def __getitem__(self, index: int) -> Sample:
        """Return "input": (C, H, W) uint8 or uint16 and "index": int; raise a SegFitError that names an unreadable file."""
        pixels = self.source.read(index)[0]
        if is_shallow(pixels):
            self.remarks[index] = f"{pixels.min()} to {pixels.max()}"
        return {"input": _tensor(pixels), "index": index}


def _tensor(pixels: Pixels) -> Tensor:
    """Return (H, W, C) as a contiguous (C, H, W)."""
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))
