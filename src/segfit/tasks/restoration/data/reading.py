"""Picture files ↔ pixels, with the depth that the file has: 8 or 16 bits."""

import struct
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from segfit.data.images import ImageReader, open_image, upright
from segfit.errors import SegFitError

Pixels: TypeAlias = NDArray[Any]  # (H, W, C) uint8 or uint16, C 1 or 3

_LUMINANCE = np.array([299, 587, 114], np.uint32)  # thousandths of R, G and B (BT.601), as Pillow
# Pillow's raw modes: of the byte order of a 16-bit value, the one that takes the other byte.
_OTHER_BYTE = {"B": "L", "L": "B", "N": "B"}


def read_picture(path: Path, image_mode: str) -> Pixels:
    """Return a picture (H, W, C), upright, C-contiguous: uint8, or uint16 where the file has 16 bits.

    Alpha is dropped; palettes and CMYK are converted. `image_mode` is "gray" for one channel, the luminance of colour
    files, or "rgb" for three.

    Raises:
        SegFitError: if the file cannot be read, or holds other than 8 or 16 bits.
    """
    with open_image(path) as image:
        deep = _deep(image, path)
        pixels = None if deep is None else upright(deep, image)[0]
    if pixels is None:
        pixels = ImageReader(image_mode).read(path).pixels
        return np.ascontiguousarray(pixels[..., :1]) if image_mode == "gray" else pixels
    if image_mode == "rgb":
        pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    elif pixels.ndim == 3:
        pixels = ((pixels @ _LUMINANCE + 500) // 1000).astype(np.uint16)
    return np.ascontiguousarray(pixels.reshape(*pixels.shape[:2], -1))


def _deep(image: Any, path: Path) -> Pixels | None:
    """Return what has 16 bits, (H, W) or (H, W, 3) uint16, as it lies in the file; None for 8 bits."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
            raise SegFitError(f"{path}: neither 8 nor 16 bits a value. Save it as a 16-bit PNG.")
        return values.astype(np.uint16)
    codec, extents, offset, arguments = image.tile[0] if image.tile else (None, None, None, "")
    raw = arguments if isinstance(arguments, str) else arguments[0]
    if not isinstance(raw, str) or ";16" not in raw:
        return None
    # Pillow has no mode for colours of 16 bits and takes the upper byte of each value: the lower one is read as well.
    low_raw = raw[:-1] + _OTHER_BYTE[raw[-1]]
    high = np.asarray(image, np.uint16)
    again: Any
    with open_image(path) as again:
        low_arguments = low_raw if isinstance(arguments, str) else (low_raw, *arguments[1:])
        again.tile = [(codec, extents, offset, low_arguments)]
        low = np.asarray(again, np.uint16)
    both: Pixels = (high[..., :3] << 8) | low[..., :3]
    return both


def png(pixels: Pixels) -> bytes:
    """Return a picture (H, W, C) uint8 or uint16 as a PNG file of that depth; Pillow writes no 16-bit colours."""
    height, width, channels = pixels.shape
    depth = 8 * pixels.dtype.itemsize
    rows = pixels.astype(pixels.dtype.newbyteorder(">")).reshape(height, -1).view(np.uint8)
    # Filter 2 (up): each row as its difference from the one above.
    rows = np.concatenate([rows[:1], rows[1:] - rows[:-1]])
    filtered = np.concatenate([np.full((height, 1), 2, np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, depth, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def as_float(pixels: Pixels) -> NDArray[np.float32]:
    """Return a picture as float32 in [0, 1]."""
    return pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
