"""Data and trainings of restoration for tests."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from segfit.tasks.restoration.data.folder import png

# The smallest training that is still one: a second or two.
SMALL = (
    "task=restoration",
    "model=cnn",
    "model.base_channels=8",
    "model.num_blocks=1",
    "patch_size=32",
    "batch_size=4",
    "epochs=2",
    "loader.workers=0",
    "device=cpu",
    "precision=fp32",
    "report.log_every=1",
)
SHAPES = (
    "data=shapes",
    "data.train_size=6",
    "data.val_size=2",
    "data.test_size=1",
    "data.resolution=64",
)
TINY = (*SMALL, *SHAPES, "report.page=false")


def picture(
    height: int, width: int, channels: int = 3, *, seed: int = 0, deep: bool = False
) -> NDArray:
    """Return blotches (H, W, C) of 8 or 16 bits: soft, as photographs are."""
    draw = np.random.default_rng(seed)
    coarse = draw.random((height // 8 + 2, width // 8 + 2, channels))
    fine = coarse.repeat(8, 0).repeat(8, 1)[:height, :width]
    smooth = sum(np.roll(fine, (i, j), (0, 1)) for i in range(4) for j in range(4)) / 16
    kind = np.uint16 if deep else np.uint8
    return (smooth * np.iinfo(kind).max).astype(kind)


def write(file: Path, pixels: NDArray) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(pixels))
    return file
