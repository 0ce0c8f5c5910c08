"""What a data set is to the rest of the house."""

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from segfit.tasks.segmentation.classes import Classes

Image = NDArray[np.uint8]
Mask = NDArray[np.uint8]


class Source(Protocol):
    """Images with masks, by index; deterministic, picklable, safe in many processes."""

    classes: Classes

    def __len__(self) -> int:
        """Return the number of images."""

    def id(self, index: int) -> str:
        """Return a unique name without suffix, relative, with / between its parts."""

    def files(self, index: int) -> list[Path]:
        """Return the files behind an item, for messages; empty for synthetic data."""

    def read(self, index: int) -> tuple[Image, Mask]:
        """Return an image (H, W, 3) uint8 RGB and its mask (H, W) uint8.

        The mask holds class indices 0 … len(classes) - 1 and `IGNORE_INDEX`.

        Raises:
            SegFitError: if a file is unreadable or its values are none of the classes.
        """
