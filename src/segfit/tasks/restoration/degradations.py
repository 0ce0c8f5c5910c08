"""How clean pictures are made bad: noise, blur, JPEG, or all three one after the other.

For training, on the device, a whole batch at once, each picture by its own seed. For evaluation, one picture at a time, the
same at every call: in the middle of each range and not clipped, as the field does it. The noise is then that of
`numpy.random.seed(0)` for every picture, which published scores of denoising are computed with (Zhang et al., arXiv
1608.03981, and their successors).
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from segfit.tasks.restoration import draws
from segfit.tasks.restoration.jpeg import JpegCodec


class Stage(nn.Module, ABC):
    """A degradation whose strength, a number or [low, high], is drawn uniformly from its range."""

    def __init__(self, strength: float | Sequence[float]) -> None:
        super().__init__()
        ends = [strength] * 2 if isinstance(strength, (int, float)) else strength
        self.low, self.high = map(float, ends)
        self.middle = (self.low + self.high) / 2  # for evaluation

    def strengths(self, share: Tensor) -> Tensor:
        """Return strengths for how far up in the range they are, 0-1."""
        return self.low + (self.high - self.low) * share

    @abstractmethod
    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Degrade images `(B, C, H, W)` float, each by its seed `(B,)` int64."""

    @abstractmethod
    def held_out(self, image: np.ndarray) -> np.ndarray:
        """Degrade an image `(H, W, C)` float32 in the middle of the range."""


class Noise(Stage):
    """Add Gaussian noise, whose standard deviation is given for values of 0-255."""

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Return images of any value range."""
        sigma = self.strengths(draws.uniforms(seeds, 1, stream=0)[:, 0]) / 255
        noise = draws.normals(seeds, images[0].numel(), stream=1).view_as(images)
        return torch.addcmul(images, noise, sigma.view(-1, 1, 1, 1))

    def held_out(self, image: np.ndarray) -> np.ndarray:
        """Return the image with the field's noise, not clipped."""
        noise = np.random.RandomState(0).normal(0, self.middle / 255, image.shape)
        return (image + noise).astype(np.float32)


class Blur(Stage):
    """Blur, by a Gaussian whose standard deviation is given, or along a straight line of the given length, in pixels."""

    def __init__(self, kind: str, strength: float | Sequence[float]) -> None:
        super().__init__(strength)
        self.kind = kind
        radius = math.ceil(3 * self.high if kind == "gaussian" else self.high / 2)
        offsets = torch.arange(-radius, radius + 1.0)
        self.rows, self.columns = nn.Buffer(offsets[:, None]), nn.Buffer(offsets[None, :])

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Return images of the same value range; a line has any direction."""
        return self._blurred(images, draws.uniforms(seeds, 2, stream=2))

    def held_out(self, image: np.ndarray) -> np.ndarray:
        """Return the image of the same value range; a line is vertical."""
        planes = torch.from_numpy(image).permute(2, 0, 1)[None]
        blurred = self._blurred(planes, torch.full((1, 2), 0.5))
        return blurred[0].permute(1, 2, 0).contiguous().numpy()

    def _blurred(self, images: Tensor, shares: Tensor) -> Tensor:
        strength, turn = self.strengths(shares[:, :1, None]), math.pi * shares[:, 1:, None]
        if self.kind == "gaussian":
            square = self.rows**2 + self.columns**2
            kernels = torch.exp(-square / (2 * strength.clamp_min(1e-3) ** 2))
        else:  # a line one pixel wide, its rim antialiased
            along = self.columns * turn.cos() + self.rows * turn.sin()
            across = self.rows * turn.cos() - self.columns * turn.sin()
            length = (strength / 2 + 0.5 - along.abs()).clamp(0, 1)
            kernels = length * (1 - across.abs()).clamp_min(0)
        kernels = kernels / kernels.sum((1, 2), keepdim=True)
        padded = F.pad(images, 4 * [kernels.shape[-1] // 2], mode="replicate")
        kernels = kernels.repeat_interleave(images.shape[1], 0)[:, None]
        planes = padded.flatten(0, 1)[None]  # a group of the convolution each
        return F.conv2d(planes, kernels, groups=len(kernels)).view_as(images)


class Jpeg(Stage):
    """Compress to JPEG, of a quality of 1-100."""

    def __init__(self, strength: float | Sequence[float]) -> None:
        super().__init__(strength)
        self.codec = JpegCodec()

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Return images in [0, 1]."""
        return self.codec(images, self.strengths(draws.uniforms(seeds, 1, stream=3)[:, 0]))  # type: ignore[no-any-return]

    def held_out(self, image: np.ndarray) -> np.ndarray:
        """Return the image as libjpeg leaves it, in [0, 1]."""
        levels = np.round(image.clip(0, 1) * 255).astype(np.uint8)
        file = io.BytesIO()
        picture = Image.fromarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)
        picture.save(file, "JPEG", quality=round(self.middle))
        return np.asarray(Image.open(file), dtype=np.float32).reshape(image.shape) / 255


class Degradation(nn.Module):
    """Stages one after the other; move it to the device of the batches.

    `options` are the values of a `DegradeConfig` by their keys.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__()
        name, stages = options["name"], nn.ModuleList()
        if name == "blur":
            kind = options["kind"]
            stages.append(Blur(kind, options["sigma" if kind == "gaussian" else "length"]))
        if name == "mixed":
            stages.append(Blur("gaussian", options["blur"]))
        if name != "jpeg":
            stages.append(Noise(options["sigma" if name == "noise" else "noise"]))
        if name in ("jpeg", "mixed"):
            stages.append(Jpeg(options["quality"]))
        self.stages = stages

    @torch.no_grad()
    def forward(self, clean: Tensor, seeds: Tensor) -> Tensor:
        """Return what is made of clean pictures `(B, C, H, W)` float32 in [0, 1], C 1 or 3; never waits for the device.

        The seeds `(B,)` int64 on the same device, one for each picture, alone decide what is drawn for it.
        """
        for stage in self.stages:
            clean = stage(clean, seeds)
        return clean

    @torch.no_grad()
    def held_out(self, clean: np.ndarray) -> np.ndarray:
        """Return what is made of a clean picture to be scored, the same at every call, not clipped.

        Both are `(H, W, C)` float32; the clean one lies in [0, 1].
        """
        for stage in self.stages:
            assert isinstance(stage, Stage)
            clean = stage.held_out(clean)
        return clean
