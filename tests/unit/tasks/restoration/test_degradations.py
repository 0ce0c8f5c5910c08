import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from segfit.data.batches import sample_seed
from segfit.tasks.restoration.degradations import Degradation, Jpeg, bits, normals, uniforms

OPTIONS = {
    "noise": {"name": "noise", "sigma": [5, 50]},
    "gaussian": {"name": "blur", "kind": "gaussian", "sigma": [0.0, 2.5], "noise": 2},
    "motion": {"name": "blur", "kind": "motion", "length": [1, 11], "noise": [0, 5]},
    "jpeg": {"name": "jpeg", "quality": [10, 90]},
    "mixed": {"name": "mixed", "blur": [0.2, 2], "noise": [0, 20], "quality": [30, 95]},
}
SEEDS = torch.tensor([sample_seed(0, 0, index) for index in range(6)])


def pictures(channels: int = 3, height: int = 40, width: int = 56) -> Tensor:
    """Smooth waves in several colours, (6, channels, height, width) in [0, 1]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = [
        torch.sin(x / (3 + n) + y / (5 + c)) / 2 + 0.5 for n in range(6) for c in range(channels)
    ]
    return torch.stack(waves).view(6, channels, height, width)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", OPTIONS)
def test_a_picture_is_the_same_in_any_batch(kind: str, channels: int) -> None:
    degradation, clean = Degradation(OPTIONS[kind]), pictures(channels)
    whole = degradation(clean, SEEDS)
    assert whole.shape == clean.shape
    assert not torch.equal(whole, clean)
    alone = [degradation(clean[i : i + 1], SEEDS[i : i + 1]) for i in range(6)]
    order = torch.tensor([4, 1, 5])
    torch.testing.assert_close(torch.cat(alone), whole)
    torch.testing.assert_close(degradation(clean[order], SEEDS[order]), whole[order])


@pytest.mark.parametrize("kind", OPTIONS)
def test_another_seed_is_another_picture(kind: str) -> None:
    degradation, clean = Degradation(OPTIONS[kind]), pictures()[:1].expand(6, -1, -1, -1)
    made = degradation(clean, SEEDS)
    assert all(not torch.equal(made[i], made[j]) for i in range(6) for j in range(i))
    assert torch.equal(degradation(clean, SEEDS), made)


def test_bits_are_splitmix64() -> None:
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    found = bits(SEEDS, 4, stream=2)
    for seed, row in zip(SEEDS.tolist(), found.tolist(), strict=True):
        start = mix((seed + 3 * golden) % 2**64)
        assert [z % 2**64 for z in row] == [mix((start + i * golden) % 2**64) for i in range(4)]


def test_draws_have_their_distributions() -> None:
    uniform, normal = uniforms(SEEDS, 50_000, 0), normals(SEEDS, 50_001, 1)
    assert uniform.min() > 0
    assert uniform.max() <= 1
    assert normal.shape == (6, 50_001)
    assert normal.isfinite().all()
    moments = [(normal**power).mean().item() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.03)
    for one in (uniform, normal):
        assert one.flatten().histc(20).std() > 0  # neither is constant
        near = torch.corrcoef(torch.stack((one[:, :-1].flatten(), one[:, 1:].flatten())))
        rows = torch.corrcoef(one)
        assert near[0, 1].abs() < 0.01
        assert (rows - torch.eye(6)).abs().max() < 0.02
    shares = uniform.flatten().histc(20, 0, 1) / uniform.numel()
    assert shares.tolist() == pytest.approx([0.05] * 20, abs=0.002)


def test_noise_has_its_standard_deviation() -> None:
    clean = pictures(height=200, width=200)
    noise = Degradation({"name": "noise", "sigma": 25})(clean, SEEDS) - clean
    assert (noise.std((1, 2, 3)) * 255).tolist() == pytest.approx([25] * 6, rel=0.01)
    ranged = Degradation({"name": "noise", "sigma": [5, 50]})(clean, SEEDS) - clean
    sigmas = ranged.std((1, 2, 3)) * 255
    assert sigmas.min() > 4.9
    assert sigmas.max() < 50.5
    assert sigmas.max() - sigmas.min() > 5


def test_held_out_noise_is_the_fields() -> None:
    clean = pictures(1)[0].permute(1, 2, 0).numpy()
    np.random.seed(0)
    expected = clean + np.random.normal(0, 25 / 255, clean.shape)
    for sigma in (25, [10, 40]):
        found = Degradation({"name": "noise", "sigma": sigma}).held_out(clean)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.min() < 0


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", OPTIONS)
def test_held_out_repeats_itself(kind: str, channels: int) -> None:
    degradation = Degradation(OPTIONS[kind])
    clean = pictures(channels)[0].permute(1, 2, 0).numpy()
    before = clean.copy()
    found = degradation.held_out(clean)
    assert found.shape == clean.shape
    assert found.dtype == np.float32
    assert np.array_equal(clean, before)
    assert np.array_equal(degradation.held_out(clean), found)


def blurred_point(degradation: Degradation) -> np.ndarray:
    clean = np.zeros((31, 31, 1), np.float32)
    clean[15, 15] = 1
    return degradation.held_out(clean)[..., 0]


def test_gaussian_blur_by_its_formula() -> None:
    options = {"name": "blur", "kind": "gaussian", "sigma": 1.5, "noise": 0}
    y, x = np.mgrid[-15:16, -15:16]
    expected = np.exp(-(x**2 + y**2) / (2 * 1.5**2)) * (np.maximum(abs(x), abs(y)) <= 5)
    found = blurred_point(Degradation(options))
    np.testing.assert_allclose(found, expected / expected.sum(), atol=1e-6)


def test_motion_blur_is_a_line() -> None:
    options = {"name": "blur", "kind": "motion", "length": 7, "noise": 0}
    expected = np.zeros((31, 31))
    expected[12:19, 15] = 1 / 7
    found = blurred_point(Degradation(options))
    np.testing.assert_allclose(found, expected, atol=1e-6)

    point = torch.zeros(6, 1, 31, 31)
    point[..., 15, 15] = 1
    lines = Degradation(options)(point, SEEDS)[:, 0]
    assert lines.sum((1, 2)).tolist() == pytest.approx([1] * 6)
    offsets = torch.arange(-15, 16.0)
    spread = (lines * (offsets**2 + offsets[:, None] ** 2)).sum((1, 2)).sqrt()
    assert spread.tolist() == pytest.approx([math.sqrt(4)] * 6, rel=0.15)  # (7² - 1) / 12


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("quality", [5, 30, 50, 75, 95])
def test_jpeg_is_libjpegs(quality: int, channels: int) -> None:
    clean = pictures(channels, height=45, width=59)[:2]
    found = Jpeg(50).compressed(clean, torch.full((2,), float(quality)))
    for ours, picture in zip(found, clean, strict=True):
        levels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        image = Image.fromarray(levels if channels == 3 else levels[..., 0])
        image.save(file, "JPEG", quality=quality)
        theirs = np.asarray(Image.open(file), np.float32).reshape(levels.shape)
        difference = np.abs(ours.permute(1, 2, 0).numpy() * 255 - theirs)
        lost = np.abs(theirs - levels).mean()
        assert difference.mean() < max(1.0, 0.1 * lost)


def test_jpeg_takes_a_quality_for_each_picture() -> None:
    clean, quality = pictures(), torch.tensor([5.0, 10, 30, 50, 80, 100])
    lost = (Jpeg(50).compressed(clean, quality) - clean).abs().mean((1, 2, 3))
    assert lost.sort(descending=True).indices.tolist() == list(range(6))
