import pytest
import torch

from segfit.tasks.segmentation.augmentation.params import AugmentationOptions, draw
from tests.contracts.augmentation_contract import ALL_ON

OPTIONS = AugmentationOptions(**ALL_ON)
RANGES = {
    "angle": (-30, 30),
    "zoom": (0.7, 1.3),
    "brightness": (0.7, 1.3),
    "contrast": (0.8, 1.2),
    "saturation": (0.8, 1.2),
    "hue": (-0.1, 0.1),
    "sigma": (0.1, 2.0),
}


@pytest.mark.parametrize("name", RANGES)
def test_draws_fill_their_range(name: str) -> None:
    drawn = getattr(draw(OPTIONS, 4000, 0), name)
    low, high = RANGES[name]
    margin = 0.01 * (high - low)
    assert low - 1e-5 <= drawn.min() <= low + margin
    assert high - margin <= drawn.max() <= high + 1e-5


def test_zoom_in_is_as_likely_as_zoom_out() -> None:
    zoom = draw(AugmentationOptions(scale=(0.5, 2.0)), 4000, 0).zoom
    assert (zoom > 1).float().mean() == pytest.approx(0.5, abs=0.03)


def test_draws_are_independent_of_each_other_and_between_seeds() -> None:
    first, second = draw(OPTIONS, 4000, 0), draw(OPTIONS, 4000, 1)
    columns = torch.stack([getattr(first, name) for name in RANGES] + [second.angle])
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    assert correlation.abs().max() < 0.06
    assert first.noise_seed != second.noise_seed


def test_switching_one_operation_off_leaves_the_others() -> None:
    drawn, without = draw(OPTIONS, 50, 3), draw(AugmentationOptions(**{**ALL_ON, "blur": 0}), 50, 3)
    assert not without.blur.any()
    for name in (*RANGES, "hflip", "vflip", "affine", "color_jitter", "noise"):
        assert torch.equal(getattr(drawn, name), getattr(without, name))


def test_a_blur_never_reaches_beyond_a_small_image() -> None:
    assert OPTIONS.blur_radius(100, 100) >= 3 * 2.0
    assert OPTIONS.blur_radius(4, 100) == 3
