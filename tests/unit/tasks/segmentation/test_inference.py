from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from segfit.tasks.segmentation import inference
from segfit.tasks.segmentation.inference import Predictor, classes_at, window_starts


def logits_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(16, 12), (37, 41), (64, 12), (16, 50), (5, 3), (9, 29), (1, 1)])
@pytest.mark.parametrize("strip", [2**24, 100])
def test_classes_at_equals_interpolation_of_the_whole(size, strip, monkeypatch):
    monkeypatch.setattr(inference, "_STRIP_ELEMENTS", strip)
    logits = logits_of(2, 5, 16, 12)
    whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    top = whole.topk(2, dim=1).values
    decided = top[:, 0] - top[:, 1] > 1e-4  # rounding may settle what is a tie
    classes = classes_at(logits, *size)
    assert classes.shape == (2, *size)
    assert classes.dtype == torch.int64
    assert decided.float().mean() > 0.95
    assert torch.equal(classes[decided], whole.argmax(1)[decided])


@pytest.mark.parametrize(
    ("length", "window", "overlap"),
    [(100, 32, 0.5), (100, 32, 0.0), (32, 32, 0.5), (33, 32, 0.9), (97, 13, 0.99)],
)
def test_windows_cover_everything_and_overlap_at_least_so_much(length, window, overlap):
    starts = window_starts(length, window, overlap)
    assert starts[0] == 0
    assert starts[-1] + window == length
    assert all(0 < b - a <= max(1, round(window * (1 - overlap))) for a, b in pairwise(starts))


def per_pixel(images: torch.Tensor) -> torch.Tensor:
    weight = logits_of(4, 3, 1, 1, seed=3)
    return F.conv2d(images, weight)


@pytest.mark.parametrize("size", [(40, 56), (32, 32), (20, 70), (10, 12)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_of_a_per_pixel_model_equal_the_whole(size, overlap, flip):
    images = logits_of(2, 3, *size)
    predicted = Predictor((32, 32), overlap, flip)(per_pixel, images)
    torch.testing.assert_close(predicted, per_pixel(images), rtol=1e-5, atol=1e-5)


def test_every_window_has_its_size():
    shapes = set()

    def forward(images):
        shapes.add(tuple(images.shape))
        return images

    Predictor((32, 48))(forward, logits_of(1, 3, 20, 100))
    assert shapes == {(1, 3, 32, 48)}


def test_flip_averages_with_the_mirror_image():
    def shifted(images):
        return images.roll(1, dims=-1)  # a model that looks to one side only

    images = logits_of(2, 3, 8, 10)
    averaged = Predictor(flip=True)(shifted, images)
    torch.testing.assert_close(averaged, (images.roll(1, -1) + images.roll(-1, -1)) / 2)
    torch.testing.assert_close(
        Predictor(flip=True)(shifted, images.flip(-1)).flip(-1), averaged
    )  # a mirrored image gets the mirrored prediction


@pytest.mark.parametrize("window", [None, (32, 32)])
def test_the_mirrored_image_has_the_classes_of_swap_exchanged(window):
    def sides(images: torch.Tensor) -> torch.Tensor:
        """Tell left from right: class 1 from class 2."""
        x = torch.linspace(-1, 1, images.shape[-1]).expand(len(images), 1, *images.shape[-2:])
        return torch.cat([0 * x, -x, x], 1)

    images = logits_of(2, 3, 32, 32)
    found = Predictor(window, flip=True, swap=[[1, 2]])(sides, images)
    torch.testing.assert_close(found, sides(images))
    assert not Predictor(window, flip=True)(sides, images).any()
