"""PSNR, SSIM and LPIPS of pictures, and how much better they are than the input; docs/metrics.md is the contract.

Its import takes seconds, torchmetrics': not before the first validation.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.functional.image import structural_similarity_index_measure

from segfit.errors import SegFitError
from segfit.tasks.restoration.schema import ScoreConfig

SMALLEST = 11  # pixels a side, of SSIM's window
PERFECT = 100.0  # dB, for a picture that equals its target: infinity would make every mean infinite
_RIM = SMALLEST // 2
_LUMA = (65.481, 128.553, 24.966)  # of RGB in 0-1 on the scale of 0-255, ITU-R BT.601; black is 16


class RestorationMetrics(Metric):
    """Means over pictures of their scores, and by how much they exceed those of the input.

    The states are sums in float64, and an update never waits for the device. PSNR is that of all channels together, SSIM
    the mean over channels; with `channels` "y" both are those of luma, where pictures have colours. `crop_border` pixels at
    each side do not count. `rounded` rounds to 8 bits first, as what is written to an 8-bit file. `lpips` names a
    network of `lpips_network`, whose errors are raised.
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, options: ScoreConfig) -> None:
        super().__init__(sync_on_compute=False)
        self.on_luma, self.crop_border = options.channels == "y", options.crop_border
        self.rounded, lpips = options.rounded, options.lpips
        self.lpips = lpips_network(lpips) if lpips else None
        self.names = ("psnr", "ssim", "lpips") if lpips else ("psnr", "ssim")
        zeros = torch.zeros(2, len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, restored: Tensor, target: Tensor, degraded: Tensor) -> None:
        """Count pictures `(B, C, H, W)` float, the target in [0, 1]; H and W at least 11 without the border."""
        for row, pictures in enumerate((restored, degraded)):
            self.sums[row] += self.scores(pictures, target).double().sum(0)
        self.count += len(target)

    def scores(self, pictures: Tensor, target: Tensor) -> Tensor:
        """Return `(B, K)` float32, the scores of each picture in the order of `names`; arguments as for `update`."""
        border = self.crop_border
        pictures, target = (self._levels(images) for images in (pictures, target))
        if border:
            inside = (..., slice(border, -border), slice(border, -border))
            pictures, target = pictures[inside], target[inside]
        scores = []
        if self.lpips is not None:
            rgb = (images.expand(-1, 3, -1, -1) for images in (pictures, target))
            scores.append(self.lpips(*rgb, normalize=True).flatten())
        if self.on_luma and target.shape[1] == 3:
            pictures, target = luma(pictures), luma(target)
        return torch.stack((psnr(pictures, target), ssim(pictures, target), *scores), 1)

    def means(self) -> dict[str, float]:
        """Return each score, and its gain over the input as `<score>_gain`; NaN without pictures. Waits for the device."""
        restored, degraded = self.sums / self.count
        names = (*self.names, *(f"{name}_gain" for name in self.names))
        return dict(zip(names, torch.cat((restored, restored - degraded)).tolist(), strict=True))

    compute = means

    def _levels(self, images: Tensor) -> Tensor:
        images = images.float().clamp(0, 1)
        return (images * 255).round() / 255 if self.rounded else images


def luma(images: Tensor) -> Tensor:
    """Return `(B, 1, H, W)`, Y of RGB `(B, 3, H, W)` in [0, 1], as MATLAB's rgb2ycbcr has it but not rounded."""
    red, green, blue = images.unbind(1)
    return ((16 + _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue) / 255)[:, None]


def psnr(pictures: Tensor, target: Tensor) -> Tensor:
    """Return `(B,)`, the PSNR in dB of each picture `(B, C, H, W)` for a range of 1, `PERFECT` at most.

    torchmetrics' function copies its constants to the device, for which the host waits four times a picture.
    """
    errors = (pictures - target).square().mean((1, 2, 3))
    return (-10 * errors.log10()).clamp_max(PERFECT)


def ssim(pictures: Tensor, target: Tensor) -> Tensor:
    """Return `(B,)`, the SSIM of each picture `(B, C, H, W)` for a range of 1 (Wang et al., 2004).

    A Gaussian window of 11 × 11 with σ 1.5, where it lies inside the picture; the mean over channels.
    """
    _, maps = structural_similarity_index_measure(
        pictures, target, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    return maps[..., _RIM:-_RIM, _RIM:-_RIM].mean((1, 2, 3))


def lpips_network(name: str) -> nn.Module:
    """Return the network of LPIPS (Zhang et al., arXiv 1801.03924), alex, vgg or squeeze; nothing is fetched.

    Raises a SegFitError if torch's cache has not the weights that torchvision gives the network.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
    from torchvision.models import get_model_weights

    network = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[name]
    url: str = get_model_weights(network).DEFAULT.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not file.exists():
        raise SegFitError(
            f"metrics.lpips={name}: needs the weights {file}, which are not there. Download {url} to that place on a "
            "machine with a network, or take metrics.lpips=null."
        )
    return LearnedPerceptualImagePatchSimilarity(name).net  # type: ignore[arg-type]
