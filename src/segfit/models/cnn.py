"""SegFit's own residual U-Net, made to be trained from random weights."""

from itertools import pairwise
from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.models.layers import average_pool, resize

Norm = Literal["batch", "none"]
POOL_GRIDS = (1, 2, 3, 6)  # cells a side that the context looks at, as in PSPNet
STAGE_WIDTHS = (2, 4, 8, 8)  # channels at strides 4, 8, 16 and 32, in base_channels


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that can train on a single value a channel: by its running statistics.

    One image of 32 × 32 is one pixel at stride 32: the mean would be the pixel, and all information lost.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise `(B, C, H, W)`."""
        if input.numel() > self.num_features:
            return super().forward(input)
        return F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def conv(
    in_channels: int, out_channels: int, kernel_size: int, norm: Norm, *, stride: int = 1
) -> nn.Sequential:
    """Return convolution and norm, `(B, in_channels, H, W) → (B, out_channels, ⌈H/stride⌉, …)`."""
    half, bias = kernel_size // 2, norm == "none"
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, stride, half, bias=bias)
    return nn.Sequential(layer, *([] if bias else [BatchNorm(out_channels)]))


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut (He et al., arXiv 1512.03385).

    The shortcut averages before it projects, so that no pixel is skipped (ResNet-D, arXiv 1812.01187).
    The last layer of the branch starts at zero: the block starts as its shortcut, which trains
    steadily, with or without normalisation (Fixup, arXiv 1901.09321).

    Shapes: `(B, in_channels, H, W) → (B, out_channels, ⌈H/stride⌉, ⌈W/stride⌉)`.
    """

    def __init__(self, in_channels: int, out_channels: int, norm: Norm, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, norm, stride=stride)
        self.conv2 = conv(out_channels, out_channels, 3, norm)
        nn.init.zeros_(cast(nn.Conv2d, self.conv2[-1]).weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), conv(in_channels, out_channels, 1, norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply branch and shortcut."""
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x), inplace=True)))


class PyramidPooling(nn.Module):
    """Let every pixel see the whole picture: averages over coarse grids (Zhao et al., arXiv 1612.01105).

    The pooled branches have no norm: one cell of one image has no statistics to normalise by.

    Shapes: `(B, channels, H, W) → (B, channels, H, W)`.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        share = channels // len(POOL_GRIDS)
        self.branches = nn.ModuleList(nn.Conv2d(channels, share, 1) for _ in POOL_GRIDS)
        self.fuse = conv(channels + share * len(POOL_GRIDS), channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Put the averages of all grids beside `x`, then mix the channels."""
        views = [x]
        for grid, branch in zip(POOL_GRIDS, self.branches, strict=True):
            pooled = F.relu(branch(average_pool(x, grid)))
            views.append(resize(pooled, x.shape[-2:]))
        return F.relu(self.fuse(torch.cat(views, 1)))


class UpBlock(nn.Module):
    """Bring deep features to the resolution of a skip connection and refine both together, by a residual block or one convolution.

    With `lateral`, the skip is projected before it is added.

    Shapes: deep `(B, deep_channels, h, w)`, skip `(B, channels, H, W)` → `(B, channels, H, W)`.
    """

    def __init__(
        self, deep_channels: int, channels: int, norm: Norm, *, lateral: bool, residual: bool
    ) -> None:
        super().__init__()
        # Before resizing: there are fewer pixels there.
        self.reduce = conv(deep_channels, channels, 1, norm)
        self.lateral = conv(channels, channels, 1, norm) if lateral else nn.Identity()
        self.refine: nn.Module = (
            ResidualBlock(channels, channels, norm)
            if residual
            else nn.Sequential(conv(channels, channels, 3, norm), nn.ReLU(inplace=True))
        )

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Fuse `deep` into `skip`."""
        deep = resize(self.reduce(deep), skip.shape[-2:])
        fused: Tensor = self.refine(F.relu(deep + self.lateral(skip), inplace=True))
        return fused


class CNN(nn.Module):
    """Residual U-Net (Ronneberger et al., arXiv 1505.04597) from full resolution to stride 32.

    The resolution of the picture itself has few channels and one convolution each way: enough to keep
    what is a pixel or two wide, such as poles, for a fifth more time. Half of it has one convolution
    each way, too; residual blocks start at stride 4, where they cost little.

    Args:
        num_classes: channels of the logits.
        base_channels: channels at stride 2; half of them at full resolution, up to 8 times at stride 32.
        num_blocks: residual blocks a level of the encoder.
        dropout: probability that a channel of the deepest features is dropped.
        norm: `batch`, or `none` for a network whose images do not influence each other.
        channels: of the images.
    """

    encoder_parts: ClassVar = ("stem", "down", "levels")

    def __init__(
        self,
        num_classes: int,
        base_channels: int = 32,
        num_blocks: int = 1,
        dropout: float = 0.0,
        norm: Norm = "batch",
        channels: int = 3,
    ) -> None:
        super().__init__()
        full, half = base_channels // 2, base_channels
        widths = [half, *(half * width for width in STAGE_WIDTHS)]
        self.stem = conv(channels, full, 3, norm)
        self.down = conv(full, half, 3, norm, stride=2)
        self.levels = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(shallow, deep, norm, stride=2),
                *(ResidualBlock(deep, deep, norm) for _ in range(num_blocks - 1)),
            )
            for shallow, deep in pairwise(widths)
        )
        self.context = PyramidPooling(widths[-1], norm)
        self.dropout = nn.Dropout2d(dropout)
        self.decoder = nn.ModuleList(
            UpBlock(deep, shallow, norm, lateral=shallow != full, residual=shallow > half)
            for shallow, deep in pairwise([full, *widths])
        )
        self.classifier = nn.Conv2d(full, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return float logits `(B, num_classes, H, W)` of normalised images `(B, 3, H, W)`, any H, W ≥ 32."""
        features = [F.relu(self.stem(images))]
        features.append(F.relu(self.down(features[-1])))
        for level in self.levels:
            features.append(level(features[-1]))
        x = self.dropout(self.context(features.pop()))
        for up in reversed(self.decoder):
            x = up(x, features.pop())
        logits: Tensor = self.classifier(x)
        return logits
