"""Image files of any common kind → (H, W, C) uint8."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from segfit.data.formats import IMAGE_SUFFIXES, Values, open_image, read_values
from segfit.data.source import Source, list_files, some
from segfit.errors import SegFitError

_FEW = 8  # shades of 255 below which an image is nearly one value
_SOME = 32  # shades below which it has lost most of what the file distinguishes
_LOOKED_AT = 2**16  # pixels
_LUMINANCE = np.array([0.299, 0.587, 0.114])  # of R, G and B (BT.601), as Pillow
PERCENTILES = (1.0, 99.0)
# Pillow's modes that TIFF does not keep as they are → those that it does
_PLAIN = {"La": "LA", "RGBa": "RGBA", "RGBX": "RGB", "YCbCr": "RGB", "HSV": "RGB"}
# What is said of images that are predicted, {} being some of them, with their least and greatest values, a dataset's `remarks`
FAINT = (
    "images that are predicted are nearly one shade to the network, with few of the values that their files have room for: {}. "
    "If those of the training were not, save these with the same depth and range (8 bits in a file of 8 bits)."
)


@dataclass(frozen=True)
class ImageReader:
    """How image files become uint8; picklable. EXIF orientation is applied, alpha dropped, palettes and CMYK converted."""

    mode: str = "rgb"  # or "gray": one channel (the luminance of colour files), repeated to three
    # two percentiles (0-100) of each image (with `bands`, of each band) that become 0 and 255
    percentiles: tuple[float, float] | None = None
    # two values that become 0 and 255. None, and no percentiles: 8 bits as they are, integers of 0 … 65535 from these,
    # others from the image's own minimum and maximum
    value_range: tuple[float, float] | None = None
    bands: tuple[int, ...] | None = None  # of the file, from 1; they become the channels

    def __call__(self, path: Path) -> NDArray[np.uint8]:
        """Return the image (H, W, C) uint8, C-contiguous, C the number of bands or 3; raises as `read`."""
        return self.read(path)[0]

    def read(self, path: Path) -> tuple[NDArray[np.uint8], Values]:
        """Return the image and what it was made of; raise a SegFitError about a file as `read_values`, or about its bands."""
        return self.convert(read_values(path, self.mode, bands=self.bands is not None), path)

    def convert(self, found: Values, path: Path) -> tuple[NDArray[np.uint8], Values]:
        """Return what `read` does of a file's values, or some rows of them; raise a SegFitError about their bands."""
        values = found.values
        if self.bands:
            values = values.reshape(*values.shape[:2], -1)
            if max(self.bands) > values.shape[2]:
                raise SegFitError(
                    f"{path}: holds {values.shape[2]} bands, and data.bands={list(self.bands)} asks for more."
                )
            values = values[..., [band - 1 for band in self.bands]]
        elif values.ndim == 3:
            if values.shape[2] == 1:
                values = values[..., 0]
            elif values.shape[2] != 3:
                raise SegFitError(
                    f"{path}: holds {values.shape[2]} bands, and images have 1 or 3. Say in training which the network "
                    f"gets, from 1 on: data.bands={list(range(1, values.shape[2] + 1))}, or some of them. To predict with a run "
                    "that had 1 or 3, save those."
                )
            elif self.mode == "gray":
                values = luminance(values)
        if self.bands and self.percentiles:
            bands = np.moveaxis(values, 2, 0)
            pixels = np.stack([scale(band, self.percentiles) for band in bands], axis=2)
        else:
            pixels = scale(values, self.percentiles, self.value_range)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        # A copy is torch's, too, where a mirrored side of one pixel is contiguous for NumPy alone.
        pixels = np.ascontiguousarray(pixels) if min(pixels.strides) > 0 else pixels.copy()
        return pixels, found._replace(values=values)


def look(pixels: NDArray[np.uint8], values: NDArray[Any]) -> tuple[str, float, float]:
    """Compare an image with the values that it was made of.

    Returns "flat" where nearly one value is left of several, "blank" where the file holds no other, else ""; and the least
    and the greatest finite value of what is meant, 0 where there is none.
    """
    finite = values if values.dtype.kind != "f" else values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    channels = values.shape[2] if values.ndim == 3 else 1
    rows, shades = values.reshape(-1, channels), pixels.reshape(-1, pixels.shape[2])[:, :channels]
    for step in (1 + len(rows) // _LOOKED_AT, 1):
        some, left = rows[::step], shades[::step]
        kind = ""
        if int((left.max(0) - left.min(0)).max()) < _FEW:
            kind = "flat" if (some != some[0]).any() else "blank"
        elif values.dtype != np.uint8:
            count, before = (max(len(np.unique(band)) for band in each.T) for each in (left, some))
            kind = "flat" if count < _SOME and before > 3 * count else ""
        if not kind:  # else what is small may have been missed
            break
    while kind == "flat":
        # What stands for "no data", or is too bright by a fault, may have taken all the range.
        edges = [finite != low, finite != high, (finite != low) & (finite != high)]
        inner = [(float(kept.min()), float(kept.max())) for e in edges if (kept := finite[e]).size]
        found = [(least, most) for least, most in inner if high / 3 - low / 3 > most - least > 0]
        if not found:
            break
        low, high = found[0]
        finite = finite[(finite >= low) & (finite <= high)]
    return kind, low, high


def luminance(values: NDArray[Any]) -> NDArray[Any]:
    """Return the grey values (H, W) of RGB (H, W, 3) in the same type; of uint8 as Pillow rounds them."""
    if values.dtype == np.uint8:
        return np.asarray(Image.fromarray(values).convert("L"))
    gray = values @ _LUMINANCE
    return np.asarray(gray if values.dtype.kind == "f" else np.rint(gray), values.dtype)


def scale(
    values: NDArray[Any],
    percentiles: tuple[float, float] | None = None,
    value_range: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Return values of any shape, bool, integer or float, as uint8.

    `value_range`, or else the `percentiles`, become 0 and 255; where both of these are one value (a mostly black image),
    minimum and maximum do. With neither: uint8 as it is; 0 … 65535 of integers; for floats, and integers outside that
    range, minimum … maximum. Not-a-number counts as the minimum, infinity as the extremes.
    """
    if values.dtype == np.uint8 and percentiles is None and value_range is None:
        return values
    table = values.dtype.kind in "biu" and values.min() >= 0 and values.max() <= 65535
    if table:  # of all values: five times as fast as sorting and scaling every pixel
        numbers = np.arange(65536, dtype=np.float32)
        low, high = value_range or (0.0, 1.0 if values.dtype.kind == "b" else 65535.0)
        if percentiles is not None:
            total = np.bincount(values.ravel().astype(np.uint16), minlength=65536).cumsum()
            ranks = np.maximum(np.ceil(np.array(percentiles) / 100 * total[-1]), 1)
            low, high = np.searchsorted(total, ranks)
            if high <= low:
                low, high = values.min(), values.max()
    else:
        finite = values[np.isfinite(values)]
        if finite.size == 0:
            return np.zeros(values.shape, np.uint8)
        least, most = finite.min(), finite.max()
        numbers = np.nan_to_num(values.astype(np.float32), nan=least, neginf=least, posinf=most)
        ends = percentiles or (0.0, 100.0)
        low, high = value_range or np.percentile(numbers, ends, method="inverted_cdf")
        if high <= low and value_range is None:
            low, high = numbers.min(), numbers.max()
    low, high = float(low), float(high)
    if high <= low:
        return np.zeros(values.shape, np.uint8)
    levels = (np.clip(numbers, low, high) - low) * (255.0 / (high - low))
    shades: NDArray[np.uint8] = np.rint(levels).astype(np.uint8)
    return shades[values.astype(np.uint16)] if table else shades


def only_images(files: Sequence[Path], place: Path) -> tuple[list[Path], list[str]]:
    """Return the image files among those at `place`, and a line about the others if any; raise a SegFitError for no image."""
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES]
    kinds = some(sorted({file.suffix or file.name for file in others}))
    if not images:
        held = f"; it holds files of type {kinds}" if others else ""
        known = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise SegFitError(f"{place}: no image in it ({known}){held}.")
    notice = f"{place}: {len(others)} files are no images ({kinds}) and are not read."
    return images, [notice] if others else []


def images_at(given: str | Path) -> tuple[list[Path], Path, list[str]]:
    """Return the images that evaluate.py's `images` names, a folder, a file or a pattern such as a/*.png; the folder of their
    names; notices.

    Raises a SegFitError if there is no image.
    """
    place = Path(given).expanduser()
    files = [place] if place.exists() else sorted(place.parent.glob(place.name))
    if not files:
        raise SegFitError(f"images={given}: no such file or folder.")
    files = list_files(place, ()) if place.is_dir() else files
    images, notices = only_images(files, place)
    return images, place if place.is_dir() else place.parent, notices


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return a uint8 image (3, H, W) resized to `size` = (h, w), bilinear with antialiasing.

    torch's integer kernel on channels-last memory: 5-7 times as fast as Pillow's, equal to ±1. CUDA has none.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    values = image.float() if image.is_cuda else image
    values = interpolate(values[None], size, mode="bilinear", antialias=True)[0]
    return values.round().to(torch.uint8) if image.is_cuda else values


@contextmanager
def folder_of(images: Sequence[Any], *, bands: bool = False) -> Iterator[str]:
    """Yield a folder of images in their order: paths (as links), PIL images, or arrays `(H, W, 3)` or `(H, W)`.

    With `bands`, arrays have any number of them, `(H, W, C)`.

    Raises a SegFitError if one is none of these; what is raised meanwhile names the files that were given.
    """
    with TemporaryDirectory(prefix="segfit-") as folder:
        given: dict[str, str] = {}
        for number, image in enumerate(images):
            place = Path(folder, f"{number:08}.tif")
            try:
                if isinstance(image, (str, os.PathLike)):
                    path = Path(image).expanduser().absolute()
                    if path.suffix.lower() not in IMAGE_SUFFIXES:
                        raise ValueError(f"{path}: its name does not end as an image's")
                    place = Path(folder, f"{number:08}-{path.name}")
                    place.symlink_to(path)
                    given[str(place)] = str(path)
                    continue
                values = None if isinstance(image, Image.Image) else np.asarray(image)
                if values is None:
                    kind = _PLAIN.get(image.mode, image.mode)
                    image.convert(kind).save(place, exif=image.getexif())
                elif values.ndim == 3 and (
                    values.dtype == np.uint16 or (bands and values.dtype.kind in "biuf")
                ):
                    if values.shape[0] < values.shape[2] <= 4:  # would be read as (C, H, W)
                        raise ValueError(f"{values.shape}: fewer rows than bands")
                    place = place.with_suffix(".npy")
                    np.save(place, values)
                else:
                    Image.fromarray(values).save(place)
                given[str(place)] = f"image {number}"
            except (TypeError, ValueError, KeyError, OSError) as error:
                raise SegFitError(
                    f"image {number}: {type(image).__name__} is no picture ({error}). Give a path, a PIL image, or an array "
                    + ("(H, W, bands)." if bands else "(H, W, 3) or (H, W) of uint8 or uint16.")
                ) from error
        try:
            yield folder
        except SegFitError as error:
            texts = error.problems
            for copied, named in given.items():
                texts = [text.replace(copied, named) for text in texts]
            raise SegFitError(texts) from error


def largest_first(source: Source) -> list[int]:
    """Return the indices of a source's samples by the pixels of their first files, most first; of others in order."""

    def pixels(index: int) -> int:
        # Samples without files are made, all of one size. What cannot be read, with data.check=off, raises when it is read.
        with suppress(SegFitError, IndexError), open_image(source.files(index)[0]) as image:
            return image.width * image.height
        return 0

    return sorted(range(len(source)), key=pixels, reverse=True)
