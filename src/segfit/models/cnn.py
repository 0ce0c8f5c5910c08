"""SegFit's own residual U-Net, made to be trained from random weights."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["batch", "none"]
POOL_GRIDS = (
    1,
    2,
    4,
)  # cells a side that the context looks at: whole picture, quarters, sixteenths


def conv(
    in_channels: int, out_channels: int, kernel_size: int, norm: Norm, *, stride: int = 1
) -> nn.Sequential:
    """Return convolution and norm, `(B, in_channels, H, W) → (B, out_channels, ⌈H/stride⌉, …)`."""
    plain = norm == "none"
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=plain)
    ]
    if not plain:
        layers.append(nn.BatchNorm2d(out_channels))
    return nn.Sequential(*layers)


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
        last = self.conv2[-1]
        assert isinstance(last, (nn.BatchNorm2d, nn.Conv2d))
        nn.init.zeros_(last.weight)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True), conv(in_channels, out_channels, 1, norm)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply branch and shortcut."""
        return F.relu(self.shortcut(x) + self.conv2(F.relu(self.conv1(x))))


class PyramidPooling(nn.Module):
    """Let every pixel see the whole picture: averages over coarse grids (Zhao et al., arXiv 1612.01105).

    The pooled branches have no norm: one cell of one image has no statistics to normalise by.

    Shapes: `(B, channels, H, W) → (B, channels, H, W)`.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in POOL_GRIDS)
        self.fuse = conv(channels, channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Add the averages of all grids, then mix the channels."""
        out = x
        for grid, branch in zip(POOL_GRIDS, self.branches, strict=True):
            pooled = F.relu(branch(F.adaptive_avg_pool2d(x, grid)))
            out = out + resize_to(pooled, x)
        return F.relu(self.fuse(out))


class UpBlock(nn.Module):
    """Bring deep features to the resolution of a skip connection and refine both together.

    Shapes: deep `(B, deep_channels, h, w)`, skip `(B, channels, H, W)` → `(B, channels, H, W)`.
    """

    def __init__(self, deep_channels: int, channels: int, norm: Norm) -> None:
        super().__init__()
        self.reduce = conv(
            deep_channels, channels, 1, norm
        )  # before resizing: fewer channels there
        self.lateral = conv(channels, channels, 1, norm)
        self.refine = ResidualBlock(channels, channels, norm)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Fuse `deep` into `skip`."""
        return self.refine(F.relu(resize_to(self.reduce(deep), skip) + self.lateral(skip)))  # type: ignore[no-any-return]


class CNN(nn.Module):
    """Residual U-Net (Ronneberger et al., arXiv 1505.04597) at strides 2, 4, 8 and 16.

    Args:
        num_classes: channels of the logits.
        base_channels: channels at stride 2; doubled a level.
        num_blocks: residual blocks a level of the encoder.
        dropout: probability that a channel is dropped before the classifier.
        norm: `batch`, or `none` for a network whose images do not influence each other.
    """

    def __init__(
        self,
        num_classes: int,
        base_channels: int = 32,
        num_blocks: int = 2,
        dropout: float = 0.1,
        norm: Norm = "batch",
    ) -> None:
        super().__init__()
        widths = [base_channels * 2**level for level in range(4)]
        self.stem = conv(3, base_channels, 3, norm, stride=2)
        self.levels = nn.ModuleList(
            nn.Sequential(
                ResidualBlock(wide // 2, wide, norm, stride=2),
                *(ResidualBlock(wide, wide, norm) for _ in range(num_blocks - 1)),
            )
            for wide in widths[1:]
        )
        self.context = PyramidPooling(widths[-1], norm)
        self.decoder = nn.ModuleList(UpBlock(2 * wide, wide, norm) for wide in widths[-2::-1])
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(base_channels, num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits.

        Args:
            images: `(B, 3, H, W)` float, normalised; any H, W ≥ 32.

        Returns:
            `(B, num_classes, H, W)` float.
        """
        features = [F.relu(self.stem(images))]
        for level in self.levels:
            features.append(level(features[-1]))
        x = self.context(features.pop())
        for up in self.decoder:
            x = up(x, features.pop())
        return resize_to(self.classifier(self.dropout(x)), images)

    def head_parameters(self) -> set[str]:
        """Return the names of the parameters that are newer than the rest: none, all start random."""
        return set()


def resize_to(x: Tensor, like: Tensor) -> Tensor:
    """Resize `x` `(B, C, h, w)` bilinearly to the height and width of `like` `(B, C', H, W)`."""
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
