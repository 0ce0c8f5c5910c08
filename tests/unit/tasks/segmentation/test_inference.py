from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from segfit.data.tiles import strips
from segfit.tasks.segmentation import inference
from segfit.tasks.segmentation.inference import Predictor, logits_at

CPU = torch.device("cpu")


def logits_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(16, 12), (37, 41), (64, 12), (16, 50), (5, 3), (9, 29), (1, 1)])
@pytest.mark.parametrize("strip", [2**24, 100])
def test_strips_of_logits_equal_interpolation_of_the_whole(size, strip, monkeypatch):
    monkeypatch.setattr(inference, "_STRIP_ELEMENTS", strip)
    logits = logits_of(2, 5, 16, 12)
    whole = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    top = whole.topk(2, dim=1).values
    decided = top[:, 0] - top[:, 1] > 1e-4  # rounding may settle what is a tie
    found = torch.cat(list(logits_at(logits, *size)), 2)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    classes = found.argmax(1)
    assert classes.shape == (2, *size)
    assert decided.float().mean() > 0.95
    assert torch.equal(classes[decided], whole.argmax(1)[decided])


@pytest.mark.parametrize(
    ("length", "window", "overlap"),
    [(100, 32, 0.5), (100, 32, 0.0), (32, 32, 0.5), (33, 32, 0.9), (97, 13, 0.99)],
)
def test_windows_cover_everything_and_overlap_at_least_so_much(length, window, overlap):
    starts = [start for start, _ in inference._spans(length, window, overlap)]
    assert starts[0] == 0
    assert starts[-1] + window == length
    assert all(0 < b - a <= max(1, round(window * (1 - overlap))) for a, b in pairwise(starts))


def per_pixel(images: torch.Tensor) -> torch.Tensor:
    weight = logits_of(4, 3, 1, 1, seed=3)
    return F.conv2d(images, weight)


def windowed(predictor: Predictor, forward, image: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(predictor.windows(forward, image, CPU, CPU)), 1)


@pytest.mark.parametrize("size", [(40, 56), (32, 32), (20, 70), (10, 12)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("flip", [False, True])
def test_windows_of_a_per_pixel_model_equal_the_whole(size, overlap, flip):
    image = logits_of(3, *size)
    predicted = windowed(Predictor((32, 32), overlap, flip, at_once=3), per_pixel, image)
    torch.testing.assert_close(predicted, per_pixel(image[None])[0], rtol=1e-5, atol=1e-5)


def test_every_window_has_its_size_and_black_around_the_image():
    seen = []

    def forward(images):
        seen.append(images)
        return images

    windowed(Predictor((32, 48), at_once=2), forward, torch.ones(3, 20, 100))
    assert [tuple(images.shape) for images in seen] == [(2, 3, 32, 48), (2, 3, 32, 48)]
    assert all(bool((images[:, :, :20] == 1).all()) for images in seen)
    assert not any(images[:, :, 20:].any() for images in seen)


def test_windows_count_by_nnunets_gaussian():
    """Half of each window is shared: σ is an eighth of it, around its middle."""
    window, values = 32, torch.rand(7, generator=torch.Generator().manual_seed(0))
    place = torch.arange(window) + 0.5
    bell = torch.exp(-(((place - window / 2) / (window / 8)) ** 2) / 2)
    total, weight = torch.zeros(2, 128)
    for number, value in enumerate(values):
        part = slice(number * window // 2, number * window // 2 + window)
        total[part] += bell * value
        weight[part] += bell
    given = iter(values)

    def forward(images):
        return torch.stack([torch.full((1, 32, 32), float(next(given))) for _ in images])

    spans = [(start, start + window) for start in range(0, 97, 16)]
    found = list(
        strips(
            forward, lambda y, x: torch.empty(3, 32, 32), [(0, 32)], spans, batch_size=4, home=CPU
        )
    )
    torch.testing.assert_close(torch.cat(found, 1)[0], (total / weight).expand(32, -1))


def test_flip_averages_with_the_mirror_image():
    def shifted(images):
        return images.roll(1, dims=-1)  # a model that looks to one side only

    images = logits_of(2, 3, 8, 10)
    averaged = Predictor(flip=True)(shifted, images)
    torch.testing.assert_close(averaged, (images.roll(1, -1) + images.roll(-1, -1)) / 2)
    torch.testing.assert_close(
        Predictor(flip=True)(shifted, images.flip(-1)).flip(-1), averaged
    )  # a mirrored image gets the mirrored prediction


def test_the_mirrored_image_has_the_classes_of_swap_exchanged():
    def sides(images: torch.Tensor) -> torch.Tensor:
        """Tell left from right: class 1 from class 2."""
        x = torch.linspace(-1, 1, images.shape[-1]).expand(len(images), 1, *images.shape[-2:])
        return torch.cat([0 * x, -x, x], 1)

    images = logits_of(2, 3, 32, 32)
    found = Predictor(flip=True, swap=[[1, 2]])(sides, images)
    torch.testing.assert_close(found, sides(images))
    assert not Predictor(flip=True)(sides, images).any()
    found = windowed(Predictor((32, 32), flip=True, swap=[[1, 2]]), sides, images[0])
    torch.testing.assert_close(found, sides(images)[0])
