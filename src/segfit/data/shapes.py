"""Built-in data: textured phantoms that look like slices of a body, drawn by index.

No organ can be recognised by its grey value: all of them, and the tissue around, share most of their intensities,
under a slow bias field as of an MR coil. They differ in texture, tint and soft outline. Distractors of any brightness
belong to the background. So a pipeline that shifts labels, swaps channels or augments only the images shows in the
scores, while a small network learns the task in a minute or two.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Field: TypeAlias = NDArray[np.float32]
Box: TypeAlias = tuple[slice, slice]

# Added to an index, it seeds an image: the splits share none.
_SPLIT_OFFSETS = {"train": 0, "val": 1 << 40, "test": 2 << 40}


class Tissue(NamedTuple):
    """How a tissue looks; intensities in 0-1, lengths as shares of the image's side."""

    mean: float  # brightness; each image draws its own within ± 0.08
    blotches: tuple[int, float]  # (cells across the image, amplitude) of smooth noise
    stripes: tuple[int, float]  # (stripes across the image, amplitude) of a warped wave
    grain: float  # standard deviation of pixel noise
    tint: tuple[float, float, float]  # added to R, G and B


_BODY = Tissue(0.42, (10, 0.07), (0, 0.0), 0.04, (0.0, 0.0, 0.0))
_ORGANS = (
    Tissue(0.54, (24, 0.08), (0, 0.0), 0.03, (0.035, 0.0, -0.035)),
    Tissue(0.50, (8, 0.03), (14, 0.08), 0.03, (0.02, 0.02, -0.02)),
    Tissue(0.50, (8, 0.03), (0, 0.0), 0.09, (-0.035, 0.0, 0.035)),
)


@dataclass(eq=False)
class ShapesSource:
    """Phantoms and what is where in them; a function of (data_seed, split, index) alone."""

    size: int  # number of images
    split: str = "train"  # or "val" or "test"; they share no image
    resolution: int = 128  # side in pixels
    data_seed: int = 0  # another seed, another data set
    classes: Any = None  # what the labels mean, where a task predicts them

    def __len__(self) -> int:
        return self.size

    def id(self, index: int) -> str:
        """Return the split and the number of the image, such as "val_0003"."""
        return f"{self.split}_{index:04d}"

    def files(self, index: int) -> list[Path]:  # noqa: ARG002
        """Return nothing: there are no files."""
        return []

    def read(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return an image (R, R, 3) uint8 RGB, R the resolution, and its labels (R, R) uint8: liver 1, kidney 2, spleen 3."""
        if not 0 <= index < self.size:
            raise IndexError(index)
        rng = np.random.default_rng((self.data_seed, _SPLIT_OFFSETS[self.split] + index))
        side = self.resolution
        image = np.full((side, side, 3), rng.uniform(0.02, 0.10), np.float32)
        box, body = _blob(
            rng, side, center=rng.normal(0.5, 0.02, 2), radius=rng.uniform(0.40, 0.47)
        )
        _paint(rng, image, box, body, _BODY)
        inside = np.zeros((side, side), bool)
        inside[box] = body
        labels = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(2, 5)):
            # A vessel or bone of any brightness: plain, where organs have a texture or a tint.
            center = 0.5 + rng.uniform(-0.33, 0.33, 2)
            box, region = _blob(rng, side, center, radius=rng.uniform(0.03, 0.08))
            tissue = _BODY._replace(mean=rng.uniform(0.30, 0.75), blotches=(6, 0.03), grain=0.02)
            _paint(rng, image, box, region & inside[box], tissue)
        # A random order decides which is on top; one image in eight lacks a given organ.
        turn = rng.uniform(0, 2 * np.pi)
        for place, organ in enumerate(rng.permutation(len(_ORGANS))):
            if rng.random() < 1 / 8:
                continue
            angle = turn + 2 * np.pi / 3 * place + rng.normal(0, 0.25)
            center = 0.5 + rng.uniform(0.15, 0.24) * np.array([np.sin(angle), np.cos(angle)])
            box, region = _blob(rng, side, center, radius=rng.uniform(0.11, 0.17))
            region &= inside[box]
            _paint(rng, image, box, region, _ORGANS[organ])
            labels[box][region] = organ + 1
        return _expose(rng, image), labels


def shapes_sources(data: Any, classes: Any = None) -> dict[str, ShapesSource]:
    """Return train, val and test of a config's data: the same images of a split whatever the sizes of the others."""
    how = data.resolution, data.data_seed, classes
    return {part: ShapesSource(data[f"{part}_size"], part, *how) for part in _SPLIT_OFFSETS}


def _blob(
    rng: np.random.Generator, side: int, center: NDArray[np.float64], radius: float
) -> tuple[Box, NDArray[np.bool_]]:
    """Return an ellipse whose radius waves slowly with the angle: its box and (h, w) bool inside it.

    `center` (y, x) and `radius`, the geometric mean of the half axes, are shares of the side.
    """
    stretch, turn = np.exp(rng.uniform(-0.28, 0.28)), rng.uniform(0, np.pi)
    harmonics = rng.normal(0, 1, (3, 2)) * np.array([[0.09], [0.05], [0.03]])
    reach = radius * np.exp(0.28) * (1 + np.abs(harmonics).sum())
    low = np.clip((center - reach) * side, 0, side - 1).astype(int)
    high = np.clip((center + reach) * side + 1, low + 1, side).astype(int)
    box = (slice(low[0], high[0]), slice(low[1], high[1]))
    grid = (np.arange(side, dtype=np.float32) + 0.5) / side
    y, x = grid[box[0], None] - np.float32(center[0]), grid[None, box[1]] - np.float32(center[1])
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    u = (cos * x + sin * y) * np.float32(1 / (radius * stretch))
    v = (cos * y - sin * x) * np.float32(stretch / radius)
    distance = np.hypot(u, v)
    # (u + iv)^k / |·|^k has cos kθ and sin kθ: harmonics without an arctangent a pixel.
    unit = (u + 1j * v) / np.maximum(distance, np.float32(1e-6))
    wave, power = np.ones_like(distance), unit
    for cosine, sine in harmonics.astype(np.float32):
        power = power * unit
        wave += cosine * power.real + sine * power.imag
    return box, np.asarray(distance < wave)


def _paint(
    rng: np.random.Generator, image: Field, box: Box, region: NDArray[np.bool_], tissue: Tissue
) -> None:
    """Draw a tissue over `region`, (h, w) bool inside the box of image (side, side, 3)."""
    side = image.shape[0]
    cells, amplitude = tissue.blotches
    gray = tissue.mean + rng.uniform(-0.08, 0.08) + amplitude * _smooth_noise(rng, side, cells, box)
    count, amplitude = tissue.stripes
    if count:
        grid = np.arange(side, dtype=np.float32) / side
        angle = rng.uniform(0, np.pi)
        ramp = np.cos(angle) * grid[box[0], None] + np.sin(angle) * grid[None, box[1]]
        phase = 2 * np.pi * count * ramp + 0.8 * _smooth_noise(rng, side, 5, box)
        gray = gray + amplitude * np.sin(phase)
    gray = gray + tissue.grain * rng.standard_normal(region.shape, dtype=np.float32)
    tint = np.array(tissue.tint, np.float32) * np.float32(rng.uniform(0.7, 1.3))
    image[box][region] = gray[region][:, None] + tint


def _expose(rng: np.random.Generator, image: Field) -> NDArray[np.uint8]:
    """Return what the scanner makes of it: blur, bias field, a cast of colour, noise; uint8."""
    side = image.shape[0]
    blur = _gaussian(side, round(rng.uniform(0.4, 0.9), 1))
    planes = blur @ image.transpose(2, 0, 1) @ blur.T
    planes *= np.clip(1 + 0.15 * _smooth_noise(rng, side, 3), 0.6, 1.4)
    planes += rng.normal(0, 0.01, (3, 1, 1)).astype(np.float32)
    planes += 0.02 * rng.standard_normal(planes.shape, dtype=np.float32)
    levels = np.rint(np.clip(planes, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(levels.transpose(1, 2, 0))


def _smooth_noise(
    rng: np.random.Generator, side: int, cells: int, box: Box = (slice(None), slice(None))
) -> Field:
    """Return the box of (side, side) noise of unit variance that is smooth over side / cells pixels."""
    spread = _spread(side, cells)
    nodes = rng.standard_normal((cells + 4, cells + 4), dtype=np.float32)
    return np.asarray(spread[box[0]] @ nodes @ spread[box[1]].T, np.float32)


@lru_cache(maxsize=64)
def _spread(side: int, cells: int) -> Field:
    """Return (side, cells + 4): Gaussian weights from a coarse grid to pixels, rows of norm 1."""
    pixels = (np.arange(side) + 0.5) / side * cells
    nodes = np.arange(cells + 4) - 1.5
    weights = np.exp(-0.5 * ((pixels[:, None] - nodes) / 0.6) ** 2)
    return np.asarray(weights / np.linalg.norm(weights, axis=1, keepdims=True), np.float32)


@lru_cache(maxsize=64)
def _gaussian(side: int, sigma: float) -> Field:
    """Return (side, side): a blur of `sigma` pixels as a matrix, rows of sum 1."""
    offsets = np.arange(side)[:, None] - np.arange(side)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)
