"""Picture files ↔ pixels, with the depth that the file has: 8 or 16 bits."""

import struct
import zlib
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from segfit.data.formats import read_values
from segfit.data.images import luminance
from segfit.errors import SegFitError

Pixels: TypeAlias = NDArray[Any]  # (H, W, C) uint8 or uint16, C 1 or 3


def read_picture(path: Path, image_mode: str) -> Pixels:
    """Return a picture (H, W, C), upright, C-contiguous: uint8, or uint16 where the file has 16 bits.

    Alpha is dropped; palettes and CMYK are converted. `image_mode` is "gray" for one channel, the luminance of colour
    files, or "rgb" for three. Raises a SegFitError if the file cannot be read, or holds other than 8 or 16 bits, or other
    than one band or three.
    """
    values, alpha, *_ = read_values(path)
    pixels = values.reshape(*values.shape[:2], -1)[..., : -1 if alpha else None]
    if pixels.shape[2] not in (1, 3):
        raise SegFitError(f"{path}: holds {pixels.shape[2]} bands; a picture has 1 or 3.")
    if pixels.dtype != np.uint8:
        if pixels.dtype.kind == "f" or pixels.min() < 0 or pixels.max() > 65535:
            raise SegFitError(f"{path}: neither 8 nor 16 bits a value. Save it as a 16-bit PNG.")
        pixels = pixels.astype(np.uint16)
    if image_mode == "rgb":
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))
    gray = luminance(pixels) if pixels.shape[2] == 3 else pixels
    return np.ascontiguousarray(gray.reshape(*pixels.shape[:2], 1))


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
