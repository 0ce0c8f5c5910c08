"""Networks that clean pictures, to be trained from random weights: a residual U-Net without normalisation, and NAFNet."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside the identity, without norm (EDSR, Lim et al., arXiv 1707.02921).

    The second one starts at zero, so that the block starts as the identity (Fixup, arXiv 1901.09321).

    Shapes: `(B, channels, H, W)` → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Add what the convolutions make of `x`."""
        added: Tensor = self.conv2(F.relu(self.conv1(x), inplace=True))
        return x + added


class ResidualUNet(nn.Module):
    """U-Net (Ronneberger et al., arXiv 1505.04597) that predicts what is wrong with a picture.

    It sees the picture at half its size with four times the channels (pixel-unshuffle, as FFDNet, arXiv 1710.04026),
    where a convolution costs a quarter; skip connections are added.

    Args:
        channels: of the pictures.
        base_channels: channels of the first level; doubled a level.
        num_blocks: blocks of each level, on the way down and again on the way up; of the deepest level, once.
        checkpointing: compute blocks again in backward instead of keeping their activations.
    """

    encoder_parts: ClassVar = ("head", "encoder", "down")
    levels: ClassVar[int] = 2
    unshuffle: ClassVar[int] = 2  # side of the square of pixels that becomes one
    block: ClassVar[type[nn.Module]] = ResidualBlock  # channels → a module that keeps a shape

    def __init__(
        self,
        channels: int,
        base_channels: int = 32,
        num_blocks: int = 4,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**level for level in range(self.levels)]
        self.checkpointing = checkpointing
        self.multiple = self.unshuffle * 2 ** (self.levels - 1)

        def blocks(width: int) -> nn.ModuleList:
            return nn.ModuleList(self.block(width) for _ in range(num_blocks))

        self.head = nn.Conv2d(channels * self.unshuffle**2, base_channels, 3, padding=1)
        self.encoder = nn.ModuleList(map(blocks, widths))
        self.down = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.decoder = nn.ModuleList(map(blocks, widths[:-1]))
        self.tail = nn.Conv2d(base_channels, channels * self.unshuffle**2, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        assert self.tail.bias is not None
        nn.init.zeros_(self.tail.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return restored pictures in the shape and type of degraded ones; untrained, these as they are.

        `images` are `(B, channels, H, W)` float, about in [0, 1]; any H, W ≥ 1.
        """
        height, width = images.shape[-2:]
        rim = (0, -width % self.multiple, 0, -height % self.multiple)
        x = self.head(F.pixel_unshuffle(F.pad(images, rim, mode="replicate"), self.unshuffle))
        skips: list[Tensor] = []
        for level, down in zip(self.encoder[:-1], self.down, strict=True):
            skips.append(self._through(level, x))
            x = down(skips[-1])
        x = self._through(self.encoder[-1], x)
        for level, up in zip(reversed(self.decoder), reversed(self.up), strict=True):
            x = self._through(level, up(x) + skips.pop())
        residual = F.pixel_shuffle(self.tail(x), self.unshuffle)[..., :height, :width]
        return images + residual

    def _through(self, blocks: nn.Module, x: Tensor) -> Tensor:
        for block in blocks.children():
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each pixel of `(B, C, H, W)`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised features; with channels last in memory, nothing is copied."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def gate(x: Tensor) -> Tensor:
    """Return the product of the two halves of the channels, the paper's SimpleGate."""
    first, second = x.chunk(2, dim=1)
    return first * second


class NAFBlock(nn.Module):
    """The paper's block: depthwise convolution, gate and channel attention, then a gated two-layer perceptron.

    Both branches are added times a factor for each channel that starts at zero.

    Shapes: `(B, channels, H, W)` → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        double = 2 * channels
        self.norm1 = ChannelNorm(channels, eps=1e-6)
        self.widen = nn.Conv2d(channels, double, 1)
        self.depthwise = nn.Conv2d(double, double, 3, padding=1, groups=double)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.norm2 = ChannelNorm(channels, eps=1e-6)
        self.expand = nn.Conv2d(channels, double, 1)
        self.reduce = nn.Conv2d(channels, channels, 1)
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Add what both branches make of `x`."""
        y: Tensor = gate(self.depthwise(self.widen(self.norm1(x))))
        y = self.project(y * self.attention(F.adaptive_avg_pool2d(y, 1)))
        x = x + y * self.beta
        y = self.reduce(gate(self.expand(self.norm2(x))))
        added: Tensor = y * self.gamma
        return x + added


class NAFNet(ResidualUNet):
    """A U-Net of `NAFBlock`s at full resolution, with four halvings (Chen et al., arXiv 2204.04676).

    The paper gives levels different numbers of blocks; here `num_blocks` stands for each, as in `ResidualUNet`, whose
    arguments these are. Channel attention averages over the picture; evaluation gives its tiles the picture's averages.
    """

    levels = 5
    unshuffle = 1
    block = NAFBlock


def make_restorer(channels: int, options: Mapping[str, Any]) -> ResidualUNet:
    """Return the network of a model's config, whose `name` is cnn or nafnet, for pictures of so many channels."""
    values = dict(options)
    kind = {"cnn": ResidualUNet, "nafnet": NAFNet}[values.pop("name")]
    return kind(channels, **values)
