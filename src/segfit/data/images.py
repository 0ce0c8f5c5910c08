"""Image files of any common kind → (H, W, 3) uint8 RGB."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

from segfit.data.files import list_files, some
from segfit.errors import SegFitError


def _jpeg_decoder() -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return what decodes a JPEG's bytes (N,) uint8 to (3, H, W) RGB; without either library Pillow serves."""
    # Wheels that were built for another torch fail in ways of their own.
    with suppress(ImportError, OSError, AttributeError, RuntimeError):
        return import_module("torchcodec.decoders").decode_jpeg  # type: ignore[no-any-return]
    with suppress(ImportError, OSError, AttributeError, RuntimeError):
        import torchvision.io  # noqa: F401  (registers torch.ops.image, which, unlike the function around it, does not warn)

        return partial(torch.ops.image.decode_jpeg.default, mode=3)  # RGB
    return None


_decode_jpeg = _jpeg_decoder()

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jfif", ".jpe", ".jp2"),
    *(".ppm", ".pgm", ".heic", ".heif"),
)
# What these suffixes stand for, and GIF, which some carry. Pillow knows many more, and runs Ghostscript for one.
_FORMATS = ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "PPM"]
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    _FORMATS.append("HEIF")
# Pillow refuses twice its MAX_IMAGE_PIXELS with an error; what lies below is a big picture, not a bomb.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")

_UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 3),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


class Decoded(NamedTuple):
    """An image as it was read."""

    pixels: NDArray[np.uint8]  # (H, W, 3) RGB, C-contiguous
    orientation: int  # EXIF orientation (1-8) that was applied; 1: none
    frames: int  # that the file holds; the first one was read


@dataclass(frozen=True)
class ImageReader:
    """How image files become uint8 RGB; picklable.

    EXIF orientation is applied, alpha is dropped, palettes and CMYK are converted. Grey files deeper
    than 8 bits are scaled from 0 … 65535 to 0 … 255 (float files from their own minimum and maximum),
    or by `intensity_window`.
    """

    mode: str = "rgb"  # or "gray": one channel (the luminance of colour files), repeated to three
    # two percentiles (0-100) of each grey image that become 0 and 255; needs "gray"
    intensity_window: tuple[float, float] | None = None

    def __call__(self, path: Path) -> NDArray[np.uint8]:
        """Return the image (H, W, 3) uint8, C-contiguous; raises as `read`."""
        return self.read(path).pixels

    def read(self, path: Path) -> Decoded:
        """Return the image and what is odd about its file.

        Raises:
            SegFitError: if the file is unreadable, truncated or unreasonably large.
        """
        with open_image(path) as image:
            frames = count_frames(image)
            pixels, orientation = upright(self._pixels(image, path), image)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[..., None], 3, axis=2)
        pixels = np.ascontiguousarray(pixels)
        if min(pixels.strides) < 0:  # a mirrored side of one pixel is contiguous, but not for torch
            pixels = pixels.copy()
        return Decoded(pixels, orientation, frames)

    def _pixels(self, image: Image.Image, path: Path) -> NDArray[np.uint8]:
        """Return (H, W, 3) or (H, W) uint8, not yet upright."""
        plain_jpeg = image.format == "JPEG" and image.mode in ("RGB", "L")
        # Pillow reads a large file piece by piece, and stops where the picture ends.
        plain_jpeg = plain_jpeg and path.stat().st_size < 4 * image.width * image.height + 2**24
        if self.mode == "rgb" and plain_jpeg and _decode_jpeg is not None:
            # libjpeg-turbo too, bit by bit the same, without Pillow's copies: up to 3 times as fast.
            data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            decoded = _decode_jpeg(data)
            return np.asarray(decoded.permute(1, 2, 0), dtype=np.uint8)
        if image.mode in _DEEP_MODES:
            return scale_gray(np.asarray(image), self.intensity_window)
        if self.mode == "rgb":
            return np.asarray(_to_rgb(image))
        # Most 8-bit grey files that were saved as RGB have equal channels: their luminance is the value.
        gray = np.asarray(image if image.mode == "L" else _to_rgb(image).convert("L"))
        return scale_gray(gray, self.intensity_window) if self.intensity_window else gray


def _to_rgb(image: Image.Image) -> Image.Image:
    # By way of RGBA, a palette with transparency keeps its colours; the alpha is then dropped.
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def upright(pixels: NDArray[Any], image: Image.Image) -> tuple[NDArray[Any], int]:
    """Return the pixels (H, W, …) of an image as its EXIF orientation says, and that (1-8); 1: none."""
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    turn = _UPRIGHT.get(orientation)
    return (turn(pixels), int(orientation)) if turn else (pixels, 1)


def count_frames(image: Image.Image) -> int:
    """Return the frames of an open file. What phones append to a JPEG, a preview or a depth map, is none."""
    return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def scale_gray(
    values: NDArray[Any], intensity_window: tuple[float, float] | None
) -> NDArray[np.uint8]:
    """Return grey values (H, W), bool, integer or float, as uint8.

    The percentiles of `intensity_window` become 0 and 255; where both are one value (a mostly black image), minimum and
    maximum do. None: 0 … 65535 of integers; for floats, and integers outside that range, minimum … maximum.
    Not-a-number counts as the minimum, infinity as the extremes.
    """
    if values.dtype.kind in "biu" and values.min() >= 0 and values.max() <= 65535:
        # A table of all values is five times as fast as sorting and scaling every pixel.
        levels = np.arange(65536, dtype=np.float32)
        counts = np.bincount(values.ravel().astype(np.uint16), minlength=65536)
        low, high = 0.0, 65535.0
        if intensity_window is not None:
            low, high = _histogram_percentiles(counts, intensity_window)
        return _stretch(levels, low, high)[values.astype(np.uint16)]
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return np.zeros(values.shape, np.uint8)
    least, most = finite.min(), finite.max()
    numbers = np.nan_to_num(values.astype(np.float32), nan=least, neginf=least, posinf=most)
    low, high = np.percentile(numbers, intensity_window or (0.0, 100.0), method="inverted_cdf")
    if high <= low:
        low, high = numbers.min(), numbers.max()
    return _stretch(numbers, float(low), float(high))


def _histogram_percentiles(
    counts: NDArray[Any], percentiles: tuple[float, float]
) -> tuple[float, float]:
    total = counts.cumsum()
    ranks = np.maximum(np.ceil(np.array(percentiles) / 100 * total[-1]), 1)
    low, high = np.searchsorted(total, ranks)
    if high <= low:
        present = np.flatnonzero(counts)
        low, high = present[0], present[-1]
    return float(low), float(high)


def _stretch(numbers: NDArray[Any], low: float, high: float) -> NDArray[np.uint8]:
    if high <= low:
        return np.zeros(numbers.shape, np.uint8)
    return np.rint(np.clip((numbers - low) * (255.0 / (high - low)), 0, 255)).astype(np.uint8)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a file by its header; any failure, there or in the body, becomes one message with the file's name.

    Raises:
        SegFitError: if the file is missing, unreadable, truncated or unreasonably large.
        MemoryError: if memory ran out.
    """
    try:
        # A pipe would be waited for, /dev/zero read without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SegFitError(f"{path}: no file, but a folder, a pipe or a device. Delete it.")
        with Image.open(path, formats=_FORMATS) as image:
            yield image
    except (SegFitError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise SegFitError(
            f"{path}: larger than {limit} megapixels, which would not fit in memory batch by batch. "
            "Save it as TIFF, which evaluate.py images=… sliding_window=true reads strip by strip, or cut it into tiles."
        ) from error
    except FileNotFoundError as error:
        raise SegFitError(f"{path}: no such file. Was it moved while SegFit ran?") from error
    except Exception as error:  # decoders raise anything
        if "can't allocate memory" in str(error):  # torch's RuntimeError
            raise MemoryError(str(error)) from error
        remedy = "Replace the file or delete it."
        if path.suffix.lower() in (".heic", ".heif") and "HEIF" not in _FORMATS:
            remedy = "To read HEIC: pip install pillow-heif."
        raise SegFitError(f"{path}: unreadable ({reason(error)}). {remedy}") from error


def only_images(files: Sequence[Path], place: Path) -> tuple[list[Path], list[str]]:
    """Return the image files among those at `place`, and a line about the others, if there are any.

    Raises:
        SegFitError: if there is no image.
    """
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    others = [
        file.suffix or file.name for file in files if file.suffix.lower() not in IMAGE_SUFFIXES
    ]
    kinds = some(sorted(set(others)))
    if not images:
        held = f"; it holds files of type {kinds}" if others else ""
        known = " ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise SegFitError(f"{place}: no image in it ({known}){held}.")
    return images, [
        f"{place}: {len(others)} files are no images ({kinds}) and are not read."
    ] * bool(others)


def images_at(given: str | Path) -> tuple[list[Path], Path, list[str]]:
    """Return the images that evaluate.py's `images` names, a folder or a file; the folder of their names; notices.

    Raises:
        SegFitError: if there is no image.
    """
    place = Path(given).expanduser()
    if not place.exists():
        raise SegFitError(f"images={given}: no such file or folder.")
    files = list_files(place, ()) if place.is_dir() else [place]
    images, notices = only_images(files, place)
    return images, place if place.is_dir() else place.parent, notices


def reason(error: Exception) -> str:
    """Return the first line of a decoder's message, without its C++ source path or our path."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if text.startswith("cannot identify image file"):
        return "not an image"
    return text.rsplit(".cpp:", 1)[-1].partition(", ")[2] or text


def resize_image(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return a uint8 image (3, H, W) resized to `size` = (h, w), bilinear with antialiasing.

    torch's integer kernel on channels-last memory: 5-7 times as fast as Pillow's, equal to ±1.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    return interpolate(image[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
