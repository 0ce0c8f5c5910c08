"""TIFF files that are too large for memory, read strip by strip."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segfit.data.formats import Values
from segfit.data.images import ImageReader
from segfit.errors import SegFitError


def is_large(pixels: int) -> bool:
    """Say whether Pillow refuses an image for its size."""
    return pixels > 2 * (Image.MAX_IMAGE_PIXELS or pixels)


class LargeImage:
    """An image `(3, H, W)` uint8 whose parts are read as they are asked for, best from top to bottom.

    `reader` makes pixels of each strip as of a file. Raises what tifffile raises.
    """

    def __init__(self, path: Path, reader: ImageReader) -> None:
        self.path, self.reader = path, reader
        self.page = cast(Any, tifffile.TiffFile(path).pages[0])
        self.shape = (3, self.page.imagelength, self.page.imagewidth)
        self._first, self._strip = 0, torch.empty(3, 0, 0, dtype=torch.uint8)

    def __getitem__(self, area: tuple[slice, slice, slice]) -> Tensor:
        """Return a part, `(3, h, w)`; raise a SegFitError if it cannot be read."""
        _, y, x = area
        last = min(y.stop, self.shape[1])
        if y.start < self._first or last > self._first + self._strip.shape[1]:
            try:
                values = self._rows(y.start, last)
            except Exception as error:  # decoders raise anything
                raise SegFitError(
                    f"{self.path}: cannot be read strip by strip ({error}). Save it as TIFF of 8 or 16 bits (deflate), or cut "
                    "it into tiles."
                ) from error
            strip = self.reader.convert(Values(values, alpha=values.shape[2] in (2, 4)), self.path)
            pixels = np.require(strip.pixels, requirements="W")
            self._first, self._strip = y.start, torch.from_numpy(pixels).permute(2, 0, 1)
        return self._strip[:, y.start - self._first : last - self._first, x]

    def _rows(self, first: int, last: int) -> NDArray[Any]:
        """Return rows `(last - first, W, samples)`; only the file's strips or tiles that hold them are decoded."""
        page, file = self.page, self.page.parent.filehandle
        if page.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"{page.dtype} values, whose range no strip knows")
        values = np.zeros((last - first, page.imagewidth, page.samplesperpixel), page.dtype)
        height, width = min(page.rowsperstrip, page.imagelength), page.imagewidth
        if page.is_tiled:
            height, width = page.tilelength, page.tilewidth
        down, across = -(-page.imagelength // height), -(-page.imagewidth // width)
        for index, count in enumerate(page.databytecounts):
            begin = index // across % down * height
            if count and first - height < begin < last:
                file.seek(page.dataoffsets[index])
                data, tables = file.read(count), page.jpegtables
                segment, (plane, _, top, left, _), _ = page.decode(data, index, jpegtables=tables)
                part = segment[0, max(first - top, 0) : last - top, : page.imagewidth - left]
                rows, columns, bands = part.shape
                start = max(top, first) - first
                values[start : start + rows, left : left + columns, plane : plane + bands] = part
        return values
