"""How clean pictures are made bad: noise, blur, JPEG, or all three one after the other.

For training, on the device, a whole batch at once, each picture by its own seed. For evaluation, one picture at a time, the
same at every call: in the middle of each range and not clipped, as the field does it. The noise is then that of
`numpy.random.seed(0)` for every picture, which published scores of denoising are computed with (Zhang et al., arXiv
1608.03981, and their successors).

torch's generators draw for a whole batch, so that a sample's numbers depend on who else is in it, and to seed one for
each sample would make the host wait. Here a counter is hashed (SplitMix64, Steele et al., OOPSLA 2014): the device
computes all numbers of a batch at once, the same in whatever batch, and nothing waits.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import dct
from torch import Tensor, nn

_STEP = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_BITS = 24  # of a float32's mantissa
_MASK = (1 << _BITS) - 1
# RGB to luma and chroma, JFIF 1.02
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def _signed(number: int) -> int:
    """Return the last 64 bits of a number as a signed one, which int64 holds."""
    return (number + 2**63) % 2**64 - 2**63


def _mix(state: Tensor) -> Tensor:
    """Hash int64 numbers in place."""
    for shift, factor in _ROUNDS:
        # int64 shifts copies of the sign in from the left, which the mask takes away
        state ^= (state >> shift).bitwise_and_((1 << 64 - shift) - 1)
        state *= _signed(factor)
    return state


def bits(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `(B, count)` int64 of 64 random bits each for `(B,)` int64 seeds; each `stream` has numbers of its own."""
    start = _mix(seeds + _signed(_STEP * (stream + 1)))
    return _mix(start[:, None] + _signed(_STEP) * torch.arange(count, device=seeds.device))


def uniforms(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `(B, count)` float32, uniform in (0, 1]; arguments as for `bits`."""
    return (bits(seeds, count, stream) & _MASK).float().add_(0.5).mul_(2.0**-_BITS)


def normals(seeds: Tensor, count: int, stream: int) -> Tensor:
    """Return `(B, count)` float32, normal with mean 0 and variance 1; arguments as for `bits`.

    By Box and Muller: a hash gives two uniform numbers, and these two normal ones.
    """
    drawn = bits(seeds, -(-count // 2), stream)
    angle = (drawn & _MASK).float().mul_(2 * math.pi * 2.0**-_BITS)
    radius = (drawn >> 64 - _BITS).bitwise_and_(_MASK).float().add_(0.5).mul_(2.0**-_BITS)
    radius = radius.log_().mul_(-2).sqrt_()
    return torch.cat((radius * angle.cos(), angle.sin_().mul_(radius)), 1)[:, :count]


class Stage(nn.Module):
    """A degradation whose strength, a number or [low, high], is drawn uniformly from its range.

    `stage(images, seeds)` degrades images `(B, C, H, W)` float, each by its seed `(B,)` int64; `held_out(image)` an image
    `(H, W, C)` float32 in the middle of the range.
    """

    def __init__(self, strength: float | Sequence[float]) -> None:
        super().__init__()
        ends = [strength] * 2 if isinstance(strength, (int, float)) else strength
        self.low, self.high = map(float, ends)
        self.middle = (self.low + self.high) / 2  # for evaluation

    def strengths(self, share: Tensor) -> Tensor:
        """Return the strengths at `share` (0-1) of the way from the lowest to the highest."""
        return self.low + (self.high - self.low) * share


class Noise(Stage):
    """Add Gaussian noise, whose standard deviation is given for values of 0-255."""

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Return images of any value range."""
        sigma = self.strengths(uniforms(seeds, 1, stream=0)[:, 0]) / 255
        noise = normals(seeds, images[0].numel(), stream=1).view_as(images)
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
        return self._blurred(images, uniforms(seeds, 2, stream=2))

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
    """Compress to JPEG, of a quality of 1-100.

    Kornia's codec is made to be differentiated and rounds softly, which would leave a network what a file has lost. This
    one rounds as libjpeg does: its tables, scaled by quality, and chroma at half the resolution.
    """

    def __init__(self, strength: float | Sequence[float]) -> None:
        super().__init__(strength)
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=50)  # whose tables are not scaled
        tables = Image.open(file).quantization  # type: ignore[attr-defined]
        cosines, to_ycc = dct(np.eye(8), axis=0, norm="ortho"), np.array(_TO_YCC)
        self.tables = nn.Buffer(torch.tensor([tables[0], tables[1]]).view(2, 1, 1, 1, 64).float())
        self.waves = nn.Buffer(torch.from_numpy(np.kron(cosines, cosines)).T.float())
        self.to_ycc = nn.Buffer(torch.from_numpy(to_ycc).float())
        self.to_rgb = nn.Buffer(torch.from_numpy(np.linalg.inv(to_ycc)).float())

    def forward(self, images: Tensor, seeds: Tensor) -> Tensor:
        """Return images in [0, 1]."""
        return self.compressed(images, self.strengths(uniforms(seeds, 1, stream=3)[:, 0]))

    def held_out(self, image: np.ndarray) -> np.ndarray:
        """Return the image as libjpeg leaves it, in [0, 1]."""
        levels = np.round(image.clip(0, 1) * 255).astype(np.uint8)
        file = io.BytesIO()
        picture = Image.fromarray(levels.squeeze(2) if levels.shape[2] == 1 else levels)
        picture.save(file, "JPEG", quality=round(self.middle))
        return np.asarray(Image.open(file), dtype=np.float32).reshape(image.shape) / 255

    def compressed(self, images: Tensor, quality: Tensor) -> Tensor:
        """Return what is left of images, with 8 bits a value, each at its quality `(B,)` float."""
        height, width = images.shape[-2:]
        levels = (images * 255).round().clamp(0, 255) - 128
        levels = F.pad(levels, (0, -width % 16, 0, -height % 16), mode="replicate")
        quality = quality.round().clamp(1, 100)
        scale = torch.where(quality < 50, 5000 / quality, 200 - 2 * quality).floor()
        steps = ((self.tables * scale.view(-1, 1, 1, 1, 1, 1) + 50) / 100).floor().clamp(1, 255)
        # Without 128, grey is 0 in every channel, before and after the change of colours.
        if images.shape[1] == 1:
            levels = self._quantised(levels, steps[:, 0])
        else:
            ycc = (self.to_ycc @ levels.flatten(2)).view_as(levels)
            luma = self._quantised(ycc[:, :1], steps[:, 0])
            chroma = self._quantised(F.avg_pool2d(ycc[:, 1:], 2), steps[:, 1])
            # libjpeg's "fancy" upsampling is bilinear.
            chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
            ycc = torch.cat((luma, chroma), 1)
            levels = (self.to_rgb @ ycc.flatten(2)).view_as(levels)
        return (levels[..., :height, :width] + 128).round().clamp(0, 255) / 255

    def _quantised(self, planes: Tensor, steps: Tensor) -> Tensor:
        """Return planes `(B, C, H, W)` after their 8×8 cosine transform was rounded to steps `(B, 1, 1, 1, 64)`."""
        blocks: Tensor = planes.round().unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
        rounded = (blocks.flatten(4) @ self.waves / steps).round() * steps
        blocks = (rounded @ self.waves.T).unflatten(4, (8, 8)).transpose(3, 4)
        return blocks.flatten(4).flatten(2, 3).round().clamp(-128, 127)


class Degradation(nn.Module):
    """Stages one after the other, by the options of a `DegradeConfig`; move it to the device of the batches."""

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
        self.stages: Any = stages

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
            clean = stage.held_out(clean)
        return clean
