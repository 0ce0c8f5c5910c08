"""Pictures of any size, also such as memory has no room for, through a network, in windows that fade into one another."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from segfit.data.formats import Values, tiff_shades
from segfit.data.images import ImageReader
from segfit.errors import SegFitError

Forward = Callable[[Tensor], Tensor]
Span = tuple[int, int]  # where a window begins and ends along a side


def strips(
    forward: Forward,
    picture: Callable[[slice, slice], Tensor],
    rows: Sequence[Span],
    columns: Sequence[Span],
    *,
    batch_size: int,
    home: torch.device,
    fade: float = 4.0,
) -> Iterator[Tensor]:
    """Yield a network's outputs for a picture, `(C, h, W)` on the device `home`, from top to bottom, as they are done.

    `picture(y, x)` is the window of these rows and columns, `(C', h, w)`; `forward` takes `batch_size` of them at once,
    `(B, C', h, w)` → `(B, C, h, w)`. No more of the outputs is in memory than the windows at work cover. Windows fade into
    one another by a Gaussian: the pixels at an edge, which know nothing of what is behind it, count next to nothing.
    `fade` is how many standard deviations an edge is from where the window counts fully. Where neighbours share half of a
    window, 4 gives the weights of nnU-Net (Isensee et al., arXiv 1809.10486): σ is an eighth of the window.
    """
    down, across = _weights(rows, fade, home), _weights(columns, fade, home)
    areas = [(row, column) for row in rows for column in columns]
    batches: list[list[tuple[Span, Span]]] = []
    for _, group in groupby(areas, lambda area: [end - start for start, end in area]):
        same = list(group)  # no batch has two sizes
        batches += [same[at : at + batch_size] for at in range(0, len(same), batch_size)]
    done, band = 0, None
    for number, batch in enumerate(batches):
        inputs = torch.stack([picture(slice(*y), slice(*x)) for y, x in batch])
        outputs = forward(inputs).to(home)  # synchronises, where home is the host
        if band is None:
            band = outputs.new_zeros(outputs.shape[1], 0, columns[-1][1])
        missing = batch[-1][0][1] - done - band.shape[1]
        if missing > 0:
            band = torch.cat([band, band.new_zeros(len(band), missing, band.shape[2])], 1)
        for (y, x), output in zip(batch, outputs, strict=True):
            share = down[y][:, None] * across[x]
            band[:, y[0] - done : y[1] - done, slice(*x)] += output * share
        ready = batches[number + 1][0][0][0] if number + 1 < len(batches) else rows[-1][1]
        if ready > done:
            yield band[:, : ready - done]
            done, band = ready, band[:, ready - done :]


def _weights(spans: Sequence[Span], fade: float, home: torch.device) -> dict[Span, Tensor]:
    """Return how much each pixel along a window counts, float32; all windows together count 1."""
    total = torch.zeros(spans[-1][1], device=home)
    weights: dict[Span, Tensor] = {}
    for number, (start, end) in enumerate(spans):
        before = spans[number - 1][1] if number else start
        after = spans[number + 1][0] if number + 1 < len(spans) else end
        place = torch.arange(end - start, device=home)
        weights[start, end] = torch.ones(end - start, device=home)
        for inwards, shared in ((place, before - start), (place.flip(0), end - after)):
            outside = (1 - (inwards + 0.5) / shared).clamp_min(0)  # 0 where there is no neighbour
            weights[start, end] *= torch.exp(-((fade * outside) ** 2) / 2)
        total[start:end] += weights[start, end]
    return {span: one / total[slice(*span)] for span, one in weights.items()}


def is_large(pixels: int) -> bool:
    """Say whether Pillow refuses an image for its size."""
    return pixels > 2 * (Image.MAX_IMAGE_PIXELS or pixels)


class LargeImage:
    """An image `(3, H, W)` uint8 whose parts are read as they are asked for, best from top to bottom.

    `reader` makes pixels of each strip as of a file. Raises what tifffile raises.
    """

    def __init__(self, path: Path, reader: ImageReader) -> None:
        import tifffile

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
                values = tiff_shades(self.page, self._rows(y.start, last))
            except Exception as error:  # decoders raise anything
                raise SegFitError(
                    f"{self.path}: cannot be read strip by strip ({error}). Save it as TIFF of 8 or 16 bits (deflate), or cut "
                    "it into tiles."
                ) from error
            values = values[..., :-1] if values.shape[2] in (2, 4) else values  # transparency
            pixels, _ = self.reader.convert(Values(values), self.path)
            pixels = np.require(pixels, requirements="W")
            self._first, self._strip = y.start, torch.from_numpy(pixels).permute(2, 0, 1)
        return self._strip[:, y.start - self._first : last - self._first, x]

    def _rows(self, first: int, last: int) -> NDArray[Any]:
        """Return rows `(last - first, W, samples)`; only the file's strips or tiles that hold them are decoded."""
        page, file = self.page, self.page.parent.filehandle
        if page.dtype not in (np.uint8, np.uint16) or page.bitspersample < 8:
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
