"""What JPEG does to pictures, on the device, each picture of a batch at a quality of its own.

Kornia's codec is made to be differentiated and rounds softly, which would leave a network what a file has lost. This one
rounds as libjpeg does: ITU-T T.81's example tables, scaled by quality, and chroma at half the resolution.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ITU-T T.81, Annex K.1, row by row
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(4 * ((99,) * 8,)),
)
_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)  # JFIF 1.02


class JpegCodec(nn.Module):
    """Compress and decompress pictures.

    Shapes: images `(B, C, H, W)` float, of which [0, 1] is kept; C = 1 or 3 (RGB), any H and W; quality `(B,)` float in
    1-100 → images of the same shape, in [0, 1], with 8 bits a value.
    """

    def __init__(self) -> None:
        super().__init__()
        place = torch.arange(8, dtype=torch.float64)
        cosines = torch.cos(math.pi / 16 * (2 * place + 1) * place[:, None]) / 2
        cosines[0] /= math.sqrt(2)  # orthonormal, so that its transpose is its inverse
        waves = cosines[:, None, :, None] * cosines[None, :, None, :]
        to_ycc = torch.tensor(_TO_YCC, dtype=torch.float64)
        self.tables = nn.Buffer(torch.tensor((_LUMA, _CHROMA)).view(2, 1, 1, 1, 64).float())
        self.waves = nn.Buffer(waves.reshape(64, 64).T.float())
        self.to_ycc = nn.Buffer(to_ycc.float())
        self.to_rgb = nn.Buffer(to_ycc.inverse().float())

    def forward(self, images: Tensor, quality: Tensor) -> Tensor:
        """Return what is left of the pictures."""
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
            ycc = _mixed(self.to_ycc, levels)
            luma = self._quantised(ycc[:, :1], steps[:, 0])
            chroma = self._quantised(F.avg_pool2d(ycc[:, 1:], 2), steps[:, 1])
            # libjpeg's "fancy" upsampling is bilinear.
            chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
            levels = _mixed(self.to_rgb, torch.cat((luma, chroma), 1))
        return (levels[..., :height, :width] + 128).round().clamp(0, 255) / 255

    def _quantised(self, planes: Tensor, steps: Tensor) -> Tensor:
        """Return planes `(B, C, H, W)` after their 8×8 cosine transform was rounded to steps `(B, 1, 1, 1, 64)`."""
        blocks: Tensor = planes.round().unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
        rounded = (blocks.flatten(4) @ self.waves / steps).round() * steps
        blocks = (rounded @ self.waves.T).unflatten(4, (8, 8)).transpose(3, 4)
        return blocks.flatten(4).flatten(2, 3).round().clamp(-128, 127)


def _mixed(matrix: Tensor, planes: Tensor) -> Tensor:
    """Return planes `(B, 3, H, W)` whose channels a matrix has mixed."""
    return (matrix @ planes.flatten(2)).view_as(planes)
