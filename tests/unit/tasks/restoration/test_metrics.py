import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from segfit.errors import SegFitError
from segfit.tasks.restoration.metrics import RestorationMetrics, lpips_network, psnr
from segfit.tasks.restoration.schema import ScoreConfig

DENOISE = Path(__file__).parents[5] / "shared" / "data" / "denoise"


def made(**options: Any) -> RestorationMetrics:
    return RestorationMetrics(ScoreConfig(**options))


def pictures(channels: int, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Restored, target and degraded pictures; a part of the values is outside of [0, 1]."""
    generator = torch.Generator().manual_seed(channels)
    target = torch.randint(256, (count, channels, 24, 31), generator=generator) / 255
    noise = torch.randn(target.shape, generator=generator)
    return target + 0.05 * noise, target, target + 0.2 * noise


def numpy_scores(found: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """PSNR and SSIM of (C, H, W) on the scale of 0-255, as the papers define them."""
    psnr = 10 * math.log10(255**2 / np.mean((found - target) ** 2))
    window = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window /= window.sum()

    def mean(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):
            views = np.lib.stride_tricks.sliding_window_view(values, 11, axis)
            values = views @ window
        return values

    maps = []
    for x, y in zip(found, target, strict=True):
        mx, my = mean(x), mean(y)
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        maps.append((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
    return psnr, float(np.mean(maps))


def levels(images: Tensor, *, rounded: bool, y: bool, border: int) -> np.ndarray:
    values = images.double().clamp(0, 1).numpy() * 255
    values = np.round(values) if rounded else values
    if y:
        weights = np.array([65.481, 128.553, 24.966]) / 255
        values = 16 + np.tensordot(values, weights, ((1,), (0,)))[:, None]
    return values[..., border : values.shape[-2] - border, border : values.shape[-1] - border]


@pytest.mark.parametrize(
    ("channels", "y", "border", "rounded"),
    [(1, False, 0, True), (3, False, 3, True), (3, True, 4, True), (3, True, 0, False)],
)
def test_equal_an_independent_computation(
    channels: int, y: bool, border: int, rounded: bool
) -> None:
    restored, target, degraded = pictures(channels)
    metrics = made(channels="y" if y else "rgb", crop_border=border, rounded=rounded)
    metrics.update(restored[:1], target[:1], degraded[:1])
    metrics.update(restored[1:], target[1:], degraded[1:])
    found = metrics.compute()
    clean, *others = (
        levels(images, rounded=rounded, y=y, border=border)
        for images in (target, restored, degraded)
    )
    after, before = (
        np.mean([numpy_scores(a, b) for a, b in zip(images, clean, strict=True)], axis=0)
        for images in others
    )
    assert found["psnr"] == pytest.approx(after[0], abs=1e-4)
    assert found["ssim"] == pytest.approx(after[1], abs=1e-5)
    assert found["psnr_gain"] == pytest.approx(after[0] - before[0], abs=1e-4)
    assert found["ssim_gain"] == pytest.approx(after[1] - before[1], abs=1e-5)


def test_psnr_is_that_of_torchmetrics() -> None:
    restored, target, _ = pictures(3)
    expected = peak_signal_noise_ratio(
        restored, target, data_range=1.0, reduction="none", dim=(1, 2, 3)
    )
    torch.testing.assert_close(psnr(restored, target), expected)


def test_a_perfect_picture_has_a_finite_score() -> None:
    _, target, degraded = pictures(3)
    metrics = made()
    metrics.update(target, target, degraded)
    found = metrics.compute()
    assert found["psnr"] == 100
    assert found["ssim"] == pytest.approx(1)


def test_without_pictures_scores_are_nan() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        found = made().compute()
    assert all(math.isnan(score) for score in found.values())


def test_lpips_without_weights_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(SegFitError) as caught:
        lpips_network("squeeze")
    assert "metrics.lpips=squeeze: needs the weights" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "https://download.pytorch.org/models/squeezenet1_1-" in str(caught.value)
    assert "metrics.lpips=null" in str(caught.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_lpips_with_weights(channels: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = os.path.basename(SqueezeNet1_1_Weights.DEFAULT.url)  # noqa: PTH119 - of a URL
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), folder / name)

    metrics = made(lpips="squeeze")
    restored, target, degraded = (images.repeat(1, 1, 2, 2) for images in pictures(channels))
    metrics.update(restored, target, degraded)
    found = metrics.compute()
    assert found["lpips"] > 0
    assert found["lpips_gain"] < 0  # less is better
    assert metrics.scores(target, target)[:, 2].tolist() == pytest.approx([0] * 3, abs=1e-6)


class DnCNN(nn.Module):
    """The network of the published weights: 17 layers, residual (Zhang et al., arXiv 1608.03981)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()]
        for _ in range(15):
            layers += [nn.Conv2d(64, 64, 3, padding=1), nn.ReLU()]
        self.model = nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return images - self.model(images)


@pytest.mark.slow
@pytest.mark.skipif(not (DENOISE / "dncnn_25.pth").exists(), reason="needs the published weights")
def test_published_weights_have_their_published_score() -> None:
    from PIL import Image

    from segfit.tasks.restoration.degradations import Degradation

    network = DnCNN()
    network.load_state_dict(torch.load(DENOISE / "dncnn_25.pth", weights_only=True))
    network = network.eval().to(memory_format=torch.channels_last)
    degradation = Degradation({"name": "noise", "sigma": 25})
    metrics = made()
    with torch.inference_mode():
        for file in sorted((DENOISE / "set12").glob("*.png")):
            clean = np.asarray(Image.open(file), np.float32)[..., None] / 255
            noisy = torch.from_numpy(degradation.held_out(clean)).permute(2, 0, 1)[None]
            target = torch.from_numpy(clean).permute(2, 0, 1)[None]
            metrics.update(network(noisy), target, noisy)
    found = metrics.compute()
    assert metrics.count == 12
    assert found["psnr"] == pytest.approx(30.43, abs=0.01)
    assert found["ssim"] == pytest.approx(0.862, abs=0.001)
    assert found["psnr"] - found["psnr_gain"] == pytest.approx(20.37, abs=0.01)
