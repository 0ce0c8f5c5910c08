import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from segfit.tasks.segmentation.augmentation import AugmentationOptions, CpuAugment, Mix, draw
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from tests.contracts.augmentation_contract import ALL_ON, AugmentationContract, scene

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
CLASSES = 4
COUNT = 6


class TestCpuAugment(AugmentationContract):
    def augment(
        self, options: dict[str, Any], images: Tensor, masks: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        pipeline = CpuAugment(**options)
        results = [
            pipeline(image, mask, seed=1000 * seed + index)
            for index, (image, mask) in enumerate(zip(images, masks, strict=True))
        ]
        new_images, new_masks = (torch.stack(part) for part in zip(*results, strict=True))
        assert new_images.dtype == new_masks.dtype == torch.uint8
        return new_images.float(), new_masks.long()


def test_workers_can_be_given_it() -> None:
    pipeline = CpuAugment(**ALL_ON)
    images, masks = scene(1)
    copied = pickle.loads(pickle.dumps(pipeline))
    expected = pipeline(images[0], masks[0], seed=3)
    result = copied(images[0], masks[0], seed=3)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


@pytest.mark.parametrize("name", RANGES)
def test_draws_fill_their_range(name: str) -> None:
    drawn = draw(OPTIONS, 4000, 0)[name]
    low, high = RANGES[name]
    margin = 0.01 * (high - low)
    assert low - 1e-5 <= drawn.min() <= low + margin
    assert high - margin <= drawn.max() <= high + 1e-5


def test_zoom_in_is_as_likely_as_zoom_out() -> None:
    zoom = draw(AugmentationOptions(scale=(0.5, 2.0)), 4000, 0)["zoom"]
    assert (zoom > 1).float().mean() == pytest.approx(0.5, abs=0.03)


def test_draws_are_independent_of_each_other_and_between_seeds() -> None:
    first, second = draw(OPTIONS, 4000, 0), draw(OPTIONS, 4000, 1)
    columns = torch.stack([first[name] for name in RANGES] + [second["angle"]])
    correlation = torch.corrcoef(columns) - torch.eye(len(columns))
    assert correlation.abs().max() < 0.06
    assert first["noise_seed"] != second["noise_seed"]


def test_switching_one_operation_off_leaves_the_others() -> None:
    drawn, without = draw(OPTIONS, 50, 3), draw(AugmentationOptions(**{**ALL_ON, "blur": 0}), 50, 3)
    assert not without["blur"].any()
    for name in (*RANGES, "hflip", "vflip", "affine", "color_jitter", "noise"):
        assert torch.equal(drawn[name], without[name])


def test_a_blur_never_reaches_beyond_a_small_image() -> None:
    assert OPTIONS.blur_radius(100, 100) >= 3 * 2.0
    assert OPTIONS.blur_radius(4, 100) == 3


def batch(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Image i is all i; its mask is all i % CLASSES, but for a row of its own that is ignored."""
    images = torch.arange(float(count)).view(-1, 1, 1, 1).expand(-1, 3, 12, 16).clone()
    masks = (torch.arange(count) % CLASSES).view(-1, 1, 1).expand(-1, 12, 16).clone()
    for index in range(count):
        masks[index, index] = IGNORE_INDEX
    return images, masks


@pytest.mark.parametrize("seed", range(5))
def test_mixup_blends_images_and_labels_alike(seed: int) -> None:
    images, masks = batch()
    mixed, targets = Mix(num_classes=CLASSES, mixup=1.0)(images, masks, seed=seed)
    assert targets.shape == (COUNT, CLASSES, 12, 16)
    valid = targets.sum(1) > 0
    torch.testing.assert_close(targets.sum(1)[valid], torch.ones(int(valid.sum())))
    for index in range(COUNT):
        ignored = (~valid[index]).all(1).nonzero().flatten().tolist()
        assert len(ignored) == 2  # its own row and its partner's
        assert index in ignored
        partner = next(row for row in ignored if row != index)
        share = (mixed[index, 0, 0, 0] - partner) / (index - partner)
        assert 0 <= share <= 1
        expected = torch.zeros(CLASSES)
        expected[index % CLASSES] += share
        expected[partner % CLASSES] += 1 - share
        torch.testing.assert_close(targets[index, :, -1, -1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_image_and_labels_alike(seed: int) -> None:
    images, masks = batch()
    mixed, targets = Mix(num_classes=CLASSES, cutmix=1.0)(images, masks, seed=seed)
    assert targets.shape == masks.shape
    origin = mixed[:, 0].long()
    own = torch.arange(COUNT).view(-1, 1, 1)
    # Every pixel brings the label that it had in the image that it comes from.
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
    assert torch.equal(targets, masks[origin, rows, columns])
    pasted = origin != own
    assert (pasted == pasted[0]).all()  # one rectangle for all
    inside = pasted[0].nonzero()
    assert pasted[0].sum() == (inside.amax(0) - inside.amin(0) + 1).prod() > 0


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"cutmix": 1.0}])
def test_arguments_and_global_generators_are_left_alone(options: dict[str, float]) -> None:
    images, masks = batch()
    before, state = (images.clone(), masks.clone()), torch.get_rng_state()
    mix = Mix(num_classes=CLASSES, **options)
    first, again = mix(images, masks, seed=1), mix(images, masks, seed=1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])
    assert torch.equal(torch.get_rng_state(), state)
    assert any(not torch.equal(mix(images, masks, seed=s)[0], first[0]) for s in range(2, 6))


def test_a_single_image_stays_as_it_is() -> None:
    images, masks = batch(1)
    mixed, targets = Mix(num_classes=CLASSES, mixup=0.5, cutmix=0.5)(images, masks, seed=0)
    assert torch.equal(mixed, images)
    assert torch.equal(targets, masks)


def test_each_kind_strikes_as_often_as_asked() -> None:
    images, masks = batch()
    mix = Mix(num_classes=CLASSES, mixup=0.2, cutmix=0.5, cutmix_alpha=50.0)
    results = [mix(images, masks, seed=seed) for seed in range(400)]
    soft = sum(targets.ndim == 4 for _, targets in results) / 400
    untouched = sum(torch.equal(mixed, images) for mixed, _ in results) / 400
    assert soft == pytest.approx(0.2, abs=0.06)
    assert untouched == pytest.approx(0.3, abs=0.06)
