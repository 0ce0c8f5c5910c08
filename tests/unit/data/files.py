"""Small data sets, written by the tests themselves."""

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image

from segfit.data import shapes


def save(path: Path, pixels: NDArray, mode: str | None = None, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def shapes_sources(
    train_size: int, val_size: int, test_size: int, resolution: int, data_seed: int
) -> dict[str, shapes.ShapesSource]:
    return shapes.shapes_sources(OmegaConf.create(locals()))


def noise(*shape: int, seed: int = 0, high: int = 256, dtype: str = "uint8") -> NDArray:
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def write_pairs(
    folder: Path, names: list[str], *, classes: int = 3, size=(12, 16), suffix: str = ".png"
) -> Path:
    """Write `folder`/images/<name><suffix> and `folder`/masks/<name>.png."""
    for seed, name in enumerate(names):
        save(folder / "images" / f"{name}{suffix}", noise(*size, 3, seed=seed))
        save(folder / "masks" / f"{name}.png", noise(*size, seed=seed, high=classes))
    return folder


def names(count: int) -> list[str]:
    return [f"{i:03d}" for i in range(count)]


def _chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width: int, height: int, depth: int, color: int, rows: bytes) -> bytes:
    """Write what Pillow cannot: any depth and colour type; each row begins with a 0."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in parts.items())
