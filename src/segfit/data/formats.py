"""Image files of any common kind → the values that they hold."""

import logging
import stat
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from importlib import import_module
from operator import add
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageSequence, UnidentifiedImageError
from PIL.ImageFile import ImageFile

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

_NIFTI = (".nii", ".nii.gz")
ARRAY_SUFFIXES = (".npy", ".nii", ".gz")
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jfif", ".jpe", ".jp2"),
    *(".ppm", ".pgm", ".heic", ".heif", *ARRAY_SUFFIXES),
)

# What these suffixes stand for, and GIF, which some carry. Pillow knows many more, and runs Ghostscript for one.
_FORMATS = ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "JPEG2000", "PPM"]
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    _FORMATS.append("HEIF")
# Pillow refuses twice its MAX_IMAGE_PIXELS with an error; what lies below is a big picture, not a bomb.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# What they log of a file they also raise, and other decoders may read it.
for _library in ("PIL", "tifffile"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)
# Tags of TIFF 6.0
_SUBFILE, _BITS, ORIENTATION, _SAMPLES, _PLANAR, _EXTRA, _NUMBERS = (
    254,
    258,
    274,
    277,
    284,
    338,
    339,
)
# Pillow's raw mode of grey values of 2 and 4 bits, but for its letters → what it multiplies them by
_SHALLOW = {"2": 85, "4": 17}

# EXIF orientation → whether an image is mirrored, left and right, and then how many quarters it is turned to the left
_UPRIGHT = {2: (1, 0), 3: (0, 2), 4: (1, 2), 5: (1, 1), 6: (0, 3), 7: (1, 3), 8: (0, 1)}


class Values(NamedTuple):
    """What a file holds, upright."""

    values: NDArray[Any]  # (H, W) or (H, W, C), of the file's own depth
    alpha: NDArray[Any] | None = None  # (H, W), transparency, unless it is a band that is wanted
    orientation: int = 1  # EXIF orientation (1-8) that was applied; 1: none
    frames: int = 1  # that the file holds; the first one was read


def read_values(path: Path, mode: str = "rgb", *, bands: bool = False) -> Values:
    """Return what an image file, with a suffix of `IMAGE_SUFFIXES`, holds, upright: palettes and CMYK as RGB, all else as it is.

    The mode "rgb" may make RGB of a grey JPEG file; "index" leaves palettes and few bits as the numbers that they are. With
    `bands` every band is wanted, and pages of a TIFF that have one each are the bands of one image. Raises a SegFitError if
    the file is unreadable, truncated or unreasonably large.
    """
    suffix, volume = path.suffix.lower(), real_file(path)
    with reading(volume):
        if volume != path:
            axis, place = "xyz".index(path.name[0]), int(path.name[1:])
            return Values(np.take(_volume(volume, volume.stat().st_mtime_ns), place, axis))
        if suffix in ARRAY_SUFFIXES:
            return Values(_read_array(path))
        with suppress(UnidentifiedImageError), Image.open(path, formats=_FORMATS) as image:
            if image.format == "TIFF" and (bands or _beyond_pillow(image)):
                return _read_tiff(path, mode, bands=bands)
            frames = _frames(image)
            values = _deep_values(image, path)
            if values is None and mode == "index":
                values = _indices(image, path)
            elif values is None:
                values = _values(image, path, fast=mode == "rgb" and not bands)
            alpha = values.ndim == 3 and values.shape[2] in (2, 4) and not bands
            return _upright(values, alpha, image.getexif().get(ORIENTATION, 1), frames)
        if suffix not in (".tif", ".tiff"):
            raise UnidentifiedImageError
        return _read_tiff(path, mode, bands=bands)


def _frames(image: Any) -> int:
    """Return how many images a file holds: previews that phones append to a JPEG, and smaller copies in a TIFF, are none."""
    if image.format != "TIFF":
        return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))
    pages: Any = ImageSequence.Iterator(image)
    frames = sum(not page.tag_v2.get(_SUBFILE, 0) & 1 for page in pages)
    image.seek(0)
    return frames


def _beyond_pillow(image: Any) -> bool:
    """Say whether a TIFF's values are not all of 8 bits or less, as many as Pillow takes, those of a pixel side by side."""
    tags, samples = image.tag_v2, len(image.getbands())
    wide = max(tags.get(_BITS, (1,))) > 8 or set(tags.get(_NUMBERS, (1,))) != {1}
    kept = tags.get(_SAMPLES, samples) == samples and 0 not in tags.get(_EXTRA, ())
    return wide or not kept or tags.get(_PLANAR, 1) != 1


def _deep_values(image: Image.Image, path: Path) -> NDArray[Any] | None:
    """Return what a PNG or JPEG 2000 file of more than 8 bits holds if Pillow takes the upper byte of it alone, else None."""
    if image.mode[0] == "I" or image.format not in ("PNG", "JPEG2000"):
        return None
    if image.format == "PNG" and ";16" not in _raw_mode(image):
        return None
    content = path.read_bytes()
    if image.format == "PNG":
        return import_module("imagecodecs").png_decode(content)  # type: ignore[no-any-return]
    # The first component's depth less one, in the codestream's SIZ segment (ISO/IEC 15444-1, A.5.1)
    if content[content.index(b"\xff\x4f\xff\x51") + 42] & 127 < 8:
        return None
    return import_module("imagecodecs").jpeg2k_decode(content)  # type: ignore[no-any-return]


def _indices(image: Image.Image, path: Path) -> NDArray[Any]:
    """Return (H, W) or (H, W, C) as the file's numbers, not yet upright."""
    mode, raw = image.mode, _raw_mode(image)
    if mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "F", "I") and mode[:4] != "I;16":
        raise SegFitError(
            f"{path}: class indices cannot be colours of this kind ({raw or mode}). Save it as an 8-bit grey PNG."
        )
    values = np.asarray(image, np.uint8 if mode == "1" else None)
    if mode in ("1", "L"):
        # Pillow turns what is white at zero, and stretches few bits to 0 … 255.
        packing = raw.partition(";")[2]
        values = np.uint8(1 if mode == "1" else 255) - values if "I" in packing else values
        values = values // np.uint8(_SHALLOW.get(packing.strip("IR"), 1))
    return values


def _values(image: Image.Image, path: Path, *, fast: bool) -> NDArray[Any]:
    """Return (H, W), or (H, W, C) with two channels or four where there is transparency, not yet upright."""
    if fast and _decode_jpeg and image.format == "JPEG" and image.mode in ("RGB", "L"):
        # torchcodec turns pictures by their EXIF orientation, the others do not.
        unturned = image.getexif().get(ORIENTATION, 1) == 1
        # Pillow reads a large file piece by piece, and stops where the picture ends.
        if unturned and path.stat().st_size < 4 * image.width * image.height + 2**24:
            # libjpeg-turbo too, bit by bit the same, without Pillow's copies: up to 3 times as fast.
            data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
            return _decode_jpeg(data).permute(1, 2, 0).numpy()
    if image.mode.startswith(("I", "F")):
        return np.asarray(image)
    if image.mode in ("PA", "La", "RGBa") or "transparency" in image.info:
        # By way of RGBA, a palette with transparency keeps its colours.
        image = image.convert("LA" if image.mode in ("1", "L", "La") else "RGBA")
    elif image.mode not in ("L", "LA", "RGB", "RGBA"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return np.asarray(image)


def _raw_mode(image: Image.Image) -> str:
    """Return Pillow's name of how a file that is not loaded yet packs its pixels, "" where there is none."""
    arguments = image.tile[0][3] if isinstance(image, ImageFile) and image.tile else None
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def with_slices(files: Iterable[Path], axis: int) -> list[Path]:
    """Return files with every NIfTI volume replaced by its slices along an axis, such as `case.nii.gz/z0012`."""
    found: list[Path] = []
    for file in files:
        count = 0
        if file.name.lower().endswith(_NIFTI):
            with reading(file):
                import nibabel

                count = nibabel.load(file).shape[axis]
        found += [file / f"{'xyz'[axis]}{place:04}" for place in range(count)] or [file]
    return found


def real_file(path: Path) -> Path:
    """Return the file that a path of `with_slices` is in."""
    return path.parent if path.parent.name.lower().endswith(_NIFTI) else path


@lru_cache(2)  # slices of a volume are mostly read one after the other, and a .gz is unpacked whole
def _volume(path: Path, _changed: int) -> NDArray[Any]:
    import nibabel

    values: NDArray[Any] = np.asanyarray(nibabel.load(path).dataobj)
    if values.ndim != 3:
        raise ValueError(f"{values.ndim} dimensions, where a volume has 3")
    return values


def _read_array(path: Path) -> NDArray[Any]:
    """Return the array of a .npy file as (H, W) or (H, W, C)."""
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if values.ndim not in (2, 3) or values.dtype.kind not in "biuf":
        raise ValueError(f"an array of {values.dtype}, {values.shape}, where (H, W, C) is wanted")
    if values.ndim == 3 and values.shape[0] < values.shape[2]:
        values = np.moveaxis(values, 0, -1)  # there are fewer bands than pixels a side
    _check_size(values.shape)
    return np.array(values)


def _read_tiff(path: Path, mode: str, *, bands: bool) -> Values:
    import tifffile

    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        pages = [page, *(each for each in file.pages[1:] if not each.is_reduced)]
        _check_size((page.imagelength, page.imagewidth))
        if max(map(add, page.dataoffsets, page.databytecounts)) > path.stat().st_size:
            raise ValueError("truncated")
        if bands and len(pages) > 1 and page.samplesperpixel == 1:
            values, pages = np.stack([each.asarray() for each in pages], axis=-1), [page]
        else:
            values = page.asarray(maxworkers=1)
            values = np.moveaxis(values, 0, -1) if page.axes == "SYX" else values
        if mode != "index":
            values = tiff_shades(page, values, bands=bands)
        alpha = values.ndim == 3 and tuple(page.extrasamples) in ((1,), (2,)) and not bands
        return _upright(values, alpha, page.tags.valueof(ORIENTATION, 1), len(pages))


def tiff_shades(page: Any, values: NDArray[Any], *, bands: bool = False) -> NDArray[Any]:
    """Return what tifffile read of a page, (H, W) or (H, W, C), the greatest value being white.

    Raises a ValueError if it is no grey or RGB of real numbers; with `bands` any colours are as good.
    """
    kind = int(page.photometric)
    known = bands or kind <= 2 or int(page.compression) == 7  # JPEG's decoder returns RGB
    if not known or values.dtype.kind not in "biuf":
        raise ValueError(f"{values.dtype} values of TIFF's PhotometricInterpretation {kind}")
    return ~values if kind == 0 and values.dtype.kind in "bu" else values


def _check_size(shape: tuple[int, ...]) -> None:
    """Raise Pillow's error if an array (H, W, …) has more pixels than Pillow would open; a ValueError if it has none."""
    if 0 in shape:
        raise ValueError("no pixel in it")
    if shape[0] * shape[1] > 2 * (Image.MAX_IMAGE_PIXELS or np.inf):
        raise Image.DecompressionBombError


def _upright(values: NDArray[Any], alpha: bool, orientation: int, frames: int) -> Values:
    orientation = orientation if orientation in _UPRIGHT else 1
    mirrored, quarters = _UPRIGHT.get(orientation, (0, 0))
    values = np.rot90(values[:, ::-1] if mirrored else values, quarters)
    if alpha:
        return Values(values[..., :-1], values[..., -1], orientation, frames)
    return Values(values, None, orientation, frames)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open a file by its header, as Pillow does; raises as `reading`."""
    with reading(path), Image.open(path, formats=_FORMATS) as image:
        yield image


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make one message with the file's name of any failure to read it.

    Raises a SegFitError if the file is missing, unreadable, truncated or unreasonably large; a MemoryError if memory ran out.
    """
    try:
        # A pipe would be waited for, /dev/zero read without end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SegFitError(f"{path}: no file, but a folder, a pipe or a device. Delete it.")
        yield
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
        package = error.name if isinstance(error, ImportError) else None
        if package:
            raise SegFitError(f"{path}: needs a package: pip install {package}.") from error
        remedy = "Replace the file or delete it."
        if path.suffix.lower() in (".heic", ".heif") and "HEIF" not in _FORMATS:
            remedy = "To read HEIC: pip install pillow-heif."
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = reason.rsplit(".cpp:", 1)[-1].partition(", ")[2] or reason  # without a C++ file
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else reason
        raise SegFitError(f"{path}: unreadable ({reason}). {remedy}") from error
