from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from segfit.tasks.segmentation.augmentation import CpuAugment, draw
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.kornia_gpu import KorniaGpu, blur, jitter, shift_hue
from tests.contracts.augmentation_contract import (
    ALL_OFF,
    ALL_ON,
    MOVES_ONLY,
    AugmentationContract,
    away_from_borders,
    scene,
)


class TestKorniaGpu(AugmentationContract):
    def augment(
        self, options: dict[str, Any], images: Tensor, masks: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        new_images, new_masks = KorniaGpu(**options)(images / 255, masks.long(), seed=seed)
        assert new_images.dtype == torch.float32
        assert new_masks.dtype == torch.int64
        return 255 * new_images, new_masks


def random_images(count: int = 5) -> Tensor:
    images = torch.rand(count, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    images[0] = images[0].round()  # pure colours, black and white: the corners of HSV
    return images


def factors(low: float, high: float, count: int = 5) -> Tensor:
    return torch.linspace(low, high, count)


def test_colours_are_torchvisions() -> None:
    images = random_images()
    brightness, contrast, saturation = factors(0.7, 1.3), factors(1.2, 0.8), factors(0.5, 1.5)
    expected = torch.stack(
        [
            tv.adjust_saturation(
                tv.adjust_contrast(tv.adjust_brightness(image, b.item()), c.item()), s.item()
            )
            for image, b, c, s in zip(images, brightness, contrast, saturation, strict=True)
        ]
    )
    result = jitter(images, brightness, contrast, saturation)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)


def test_hue_is_torchvisions() -> None:
    images, turns = random_images(), factors(-0.5, 0.4)
    expected = [tv.adjust_hue(i, t.item()) for i, t in zip(images, turns, strict=True)]
    torch.testing.assert_close(shift_hue(images, turns), torch.stack(expected), rtol=0, atol=1e-5)


def test_blur_is_torchvisions() -> None:
    images, sigma = random_images(), factors(0.1, 2.0)
    expected = [
        tv.gaussian_blur(i, [13, 13], [s.item()]) for i, s in zip(images, sigma, strict=True)
    ]
    result = blur(images, sigma.view(-1, 1), radius=6)
    torch.testing.assert_close(result, torch.stack(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_both_pipelines_do_the_same_to_one_image(seed: int) -> None:
    """Independent implementations, one set of draws: flips, direction and order have to agree."""
    images, masks = scene(1, 64, 48)
    options = {**ALL_ON, "noise": 0.0}
    image, mask = CpuAugment(**options)(images[0], masks[0], seed=seed)
    new_images, new_masks = KorniaGpu(**options)(images / 255, masks.long(), seed=seed)
    agree = new_masks[0] == mask
    assert agree.float().mean() > 0.98
    inside = (away_from_borders(mask[None].long()) & (mask != IGNORE_INDEX))[0] & agree
    difference = (255 * new_images[0] - image).abs().amax(0)
    assert inside.any()
    assert difference[inside].max() <= 6  # uint8 truncates after every operation


@pytest.mark.parametrize("option", ["affine", "color_jitter", "blur", "noise"])
def test_images_that_nothing_strikes_are_the_same_to_the_last_bit(option: str) -> None:
    images, masks = random_images(40), torch.zeros(40, 24, 32, dtype=torch.int64)
    pipeline = KorniaGpu(**{**ALL_OFF, "blur_sigma": (1.0, 2.0), option: 0.5})
    struck = draw(pipeline, 40, 0)[option]
    result, _ = pipeline(images, masks, seed=0)
    assert torch.equal((result == images).flatten(1).all(1), ~struck)


def test_a_flip_inside_the_warp_is_a_flip_before_it() -> None:
    images, masks = random_images(), scene(5, 24, 32)[1].long()
    options = {**MOVES_ONLY, "hflip": 1.0, "vflip": 1.0}
    together = KorniaGpu(**options)(images, masks, seed=0)
    one_by_one = KorniaGpu(**{**options, "hflip": 0.0, "vflip": 0.0})(
        images.flip(-1, -2), masks.flip(-1, -2), seed=0
    )
    torch.testing.assert_close(together[0], one_by_one[0], rtol=0, atol=1e-4)
    assert (together[1] == one_by_one[1]).float().mean() > 0.995


def test_channels_last_batches_work() -> None:
    images, masks = random_images(), scene(5, 24, 32)[1].long()
    pipeline = KorniaGpu(**ALL_ON)
    expected = pipeline(images, masks, seed=1)
    result = pipeline(images.to(memory_format=torch.channels_last), masks, seed=1)
    torch.testing.assert_close(result[1], expected[1])
    noisy = draw(pipeline, 5, 1)["noise"]
    torch.testing.assert_close(result[0][~noisy], expected[0][~noisy], rtol=0, atol=1e-5)


def test_nothing_waits_for_the_device() -> None:
    """The meta device has no data, so that whatever reads a value or a count from it fails."""
    pipeline = KorniaGpu(**{**ALL_ON, "noise": 0.0})  # "meta" has no generator
    images = random_images(40).to("meta")  # so many that everything strikes some
    masks = torch.zeros(40, 24, 32, dtype=torch.int64, device="meta")
    new_images, new_masks = pipeline(images, masks, seed=0)
    assert (new_images.device.type, new_images.shape) == ("meta", images.shape)
    assert (new_masks.device.type, new_masks.shape) == ("meta", masks.shape)
