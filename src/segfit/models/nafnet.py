"""NAFNet, Simple Baselines for Image Restoration (Chen et al., arXiv 2204.04676)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.models.residual_unet import ResidualUNet


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
    """A U-Net of `NAFBlock`s at full resolution, with four halvings as in the paper.

    The paper gives levels different numbers of blocks; here `num_blocks` stands for each, as in `ResidualUNet`, whose
    arguments these are. Channel attention averages over the picture: tiles of a picture are not restored quite like the
    whole.
    """

    levels = 5
    unshuffle = 1
    block = NAFBlock
