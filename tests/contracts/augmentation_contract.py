"""What every augmentation pipeline keeps; inherit `AugmentationContract` and say how yours is called."""

from abc import ABC, abstractmethod
from typing import Any

import pytest
import torch
from torch import Tensor

from segfit.tasks.segmentation.classes import IGNORE_INDEX

ALL_ON: dict[str, Any] = {
    "hflip": 0.5,
    "vflip": 0.5,
    "affine": 0.8,
    "degrees": 30.0,
    "scale": (0.7, 1.3),
    "zoom_anywhere": True,
    "color_jitter": 0.8,
    "brightness": 0.3,
    "contrast": 0.2,
    "saturation": 0.2,
    "hue": 0.1,
    "blur": 0.5,
    "blur_sigma": (0.1, 2.0),
    "noise": 0.5,
    "noise_std": 0.05,
}
ALL_OFF = ALL_ON | dict.fromkeys(("hflip", "vflip", "affine", "color_jitter", "blur", "noise"), 0.0)
STILL = {**ALL_OFF, "degrees": 0.0, "scale": (1.0, 1.0), "zoom_anywhere": False}
COLOR_ONLY = {**ALL_ON, "hflip": 0.0, "vflip": 0.0, "affine": 0.0}
MOVES_ONLY = {**ALL_ON, "affine": 1.0, "color_jitter": 0.0, "blur": 0.0, "noise": 0.0}
PALETTE = torch.tensor([[0, 0, 0], [200, 30, 60], [40, 180, 90], [90, 70, 220]], dtype=torch.uint8)


def scene(count: int = 6, height: int = 40, width: int = 56) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W) uint8 whose colour encodes their mask (B, H, W) uint8: blocks of 8 pixels.

    One class of `PALETTE` is in no mask; some pixels are ignored (and have the colour of class 0).
    """
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randint(0, 3, (count, height // 8, width // 8), generator=generator)
    masks = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    images = PALETTE[masks].permute(0, 3, 1, 2).contiguous()
    masks = masks.to(torch.uint8)
    ignored = masks == 0
    ignored[:, height // 2 :] = False
    return images, masks.masked_fill(ignored, IGNORE_INDEX)


def away_from_borders(masks: Tensor) -> Tensor:
    """Tell the pixels (B, H, W) whose 5 × 5 neighbours all have their class."""
    padded = torch.nn.functional.pad(masks[:, None].float(), (2, 2, 2, 2), value=-1)
    largest = torch.nn.functional.max_pool2d(padded, 5, 1)
    smallest = -torch.nn.functional.max_pool2d(-padded, 5, 1)
    return (largest == smallest)[:, 0]


class AugmentationContract(ABC):
    """Inherit as `class TestMine(AugmentationContract)` and define `augment`."""

    @abstractmethod
    def augment(
        self, options: dict[str, Any], images: Tensor, masks: Tensor, seed: int
    ) -> tuple[Tensor, Tensor]:
        """Augment (B, 3, H, W) uint8 and (B, H, W) uint8 by the pipeline.

        Returns:
            images (B, 3, H, W) float in units of 0-255 (not rounded, if the pipeline does not), and
            masks (B, H, W) int64. Must check that the pipeline keeps its own dtypes.
        """

    @pytest.mark.parametrize(("count", "height", "width"), [(6, 40, 56), (1, 64, 48), (3, 8, 16)])
    def test_shapes_and_ranges_stay(self, count: int, height: int, width: int) -> None:
        images, masks = scene(count, height, width)
        for seed in range(4):
            new_images, new_masks = self.augment(ALL_ON, images, masks, seed)
            assert new_images.shape == images.shape
            assert new_masks.shape == masks.shape
            assert new_images.min() >= 0
            assert new_images.max() <= 255

    def test_the_seed_decides(self) -> None:
        images, masks = scene()
        first = self.augment(ALL_ON, images, masks, 7)
        again = self.augment(ALL_ON, images, masks, 7)
        other = self.augment(ALL_ON, images, masks, 8)
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        assert not torch.equal(first[0], other[0])
        assert not torch.equal(first[1], other[1])

    def test_images_of_a_batch_differ(self) -> None:
        images, masks = (part[:1].repeat(8, 1, 1, 1).view(8, *part.shape[1:]) for part in scene())
        new_images, new_masks = self.augment(MOVES_ONLY, images, masks, 0)
        assert len(new_images.unique(dim=0)) == 8
        assert len(new_masks.unique(dim=0)) == 8

    def test_arguments_and_global_generators_are_left_alone(self) -> None:
        images, masks = scene()
        before = images.clone(), masks.clone()
        state = torch.get_rng_state()
        self.augment(ALL_ON, images, masks, 0)
        assert torch.equal(images, before[0])
        assert torch.equal(masks, before[1])
        assert torch.equal(torch.get_rng_state(), state)

    def test_probability_zero_is_identity(self) -> None:
        images, masks = scene()
        new_images, new_masks = self.augment(ALL_OFF, images, masks, 0)
        torch.testing.assert_close(new_images, images.float(), rtol=0, atol=1e-4)
        assert torch.equal(new_masks, masks.long())

    @pytest.mark.parametrize(("option", "dim"), [("hflip", -1), ("vflip", -2)])
    def test_flips_are_exact(self, option: str, dim: int) -> None:
        images, masks = scene()
        new_images, new_masks = self.augment({**STILL, option: 1.0}, images, masks, 0)
        torch.testing.assert_close(new_images, images.float().flip(dim), rtol=0, atol=1e-4)
        assert torch.equal(new_masks, masks.long().flip(dim))

    def test_masks_get_no_new_class(self) -> None:
        images, masks = scene()
        masks = masks.masked_fill(masks == 1, 3)  # 0 and 3: a blend of them would be 1 or 2
        known = {*masks.unique().tolist(), IGNORE_INDEX}
        for seed in range(5):
            _, new_masks = self.augment(MOVES_ONLY, images, masks, seed)
            assert set(new_masks.unique().tolist()) <= known

    def test_outside_of_the_frame_is_ignored_and_filled(self) -> None:
        images = torch.full((2, 3, 40, 60), 255, dtype=torch.uint8)
        masks = torch.zeros(2, 40, 60, dtype=torch.uint8)
        options = {**STILL, "affine": 1.0, "scale": (0.5, 0.5), "fill": (0.2, 0.4, 0.6)}
        new_images, new_masks = self.augment(options, images, masks, 0)
        inside = torch.zeros(40, 60, dtype=torch.bool)
        inside[10:30, 15:45] = True
        assert torch.equal(new_masks == 0, inside.expand(2, -1, -1))
        assert (new_masks[:, ~inside] == IGNORE_INDEX).all()
        far = torch.zeros_like(inside)
        far[:8], far[32:] = True, True
        expected = torch.tensor([51.0, 102.0, 153.0]).view(3, 1)
        torch.testing.assert_close(
            new_images[:, :, far], expected.expand(2, 3, int(far.sum())), rtol=0, atol=0.6
        )

    def test_image_and_mask_move_together(self) -> None:
        images, masks = scene()
        for seed in range(6):
            new_images, new_masks = self.augment(MOVES_ONLY, images, masks, seed)
            sure = away_from_borders(new_masks) & (new_masks != IGNORE_INDEX)
            expected = PALETTE[new_masks.masked_fill(~sure, 0)].permute(0, 3, 1, 2).float()
            difference = (new_images - expected).abs().amax(1)[sure]
            assert sure.float().mean() > 0.05
            assert difference.max() <= 1

    def test_zoom_enlarges_and_rotation_is_clockwise(self) -> None:
        images = torch.zeros(1, 3, 41, 61, dtype=torch.uint8)
        masks = torch.zeros(1, 41, 61, dtype=torch.uint8)
        masks[0, 18:23, 40:45] = 1  # right of the centre
        _, zoomed = self.augment({**STILL, "affine": 1.0, "scale": (1.4, 1.4)}, images, masks, 0)
        rows, columns = (zoomed[0] == 1).nonzero(as_tuple=True)
        assert len(rows) == pytest.approx(25 * 1.4**2, rel=0.1)
        assert columns.float().mean() - 30 == pytest.approx(12 * 1.4, abs=0.5)
        assert rows.float().mean() == pytest.approx(20, abs=0.5)
        for seed in range(8):
            turned = self.augment({**STILL, "affine": 1.0, "degrees": 90.0}, images, masks, seed)[1]
            rows, columns = (turned[0] == 1).nonzero(as_tuple=True)
            distance = torch.hypot(rows.float().mean() - 20, columns.float().mean() - 30)
            assert distance == pytest.approx(12, abs=0.6)

    @pytest.mark.parametrize("zoom", [0.5, 2.0])
    def test_zoom_anywhere_wastes_nothing(self, zoom: float) -> None:
        """Zoomed in, the frame is full; zoomed out, it holds the whole image: wherever that is."""
        images = torch.zeros(12, 3, 40, 60, dtype=torch.uint8)
        masks = torch.zeros(12, 40, 60, dtype=torch.uint8)
        masks[:, 20:] = 1
        masks[:, :, 30:] += 2
        options = {**STILL, "affine": 1.0, "scale": (zoom, zoom), "zoom_anywhere": True}
        _, moved = self.augment(options, images, masks, 0)
        inside = (moved != IGNORE_INDEX).flatten(1).float().mean(1)
        torch.testing.assert_close(inside, torch.full((12,), min(zoom**2, 1.0)), rtol=0, atol=0.08)
        assert len(moved.unique(dim=0)) == 12

    def test_colour_operations_leave_masks_alone(self) -> None:
        images, masks = scene()
        new_images, new_masks = self.augment(COLOR_ONLY, images, masks, 0)
        assert torch.equal(new_masks, masks.long())
        assert (new_images - images).abs().mean() > 1

    def test_operations_strike_as_often_as_asked(self) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (120, 3, 8, 8), generator=generator).to(torch.uint8)
        masks = torch.zeros(120, 8, 8, dtype=torch.uint8)
        for option in ("hflip", "affine", "color_jitter", "blur", "noise"):
            options = {**ALL_OFF, "blur_sigma": (1.0, 2.0), option: 0.3}
            new_images, _ = self.augment(options, images, masks, 0)
            struck = ((new_images - images).abs().amax((1, 2, 3)) > 0.5).float().mean()
            assert struck == pytest.approx(0.3, abs=0.12), option

    def test_noise_has_the_strength_that_was_asked(self) -> None:
        images = torch.full((2, 3, 64, 64), 128, dtype=torch.uint8)
        masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
        new_images, _ = self.augment({**STILL, "noise": 1.0, "noise_std": 0.05}, images, masks, 0)
        assert new_images.std() / 255 == pytest.approx(0.05, rel=0.05)
        assert new_images.mean() == pytest.approx(128, abs=0.5)

    def test_noise_saturates(self) -> None:
        images = torch.full((1, 3, 32, 32), 253, dtype=torch.uint8)
        masks = torch.zeros(1, 32, 32, dtype=torch.uint8)
        new_images, _ = self.augment({**STILL, "noise": 1.0, "noise_std": 0.05}, images, masks, 0)
        assert new_images.max() == 255
        assert new_images.min() > 150

    def test_blur_smooths_and_keeps_the_mean(self) -> None:
        images, masks = scene()
        new_images, _ = self.augment(
            {**STILL, "blur": 1.0, "blur_sigma": (2.0, 2.0)}, images, masks, 0
        )
        steps = images.float().diff(dim=3).abs().amax((2, 3))
        assert (new_images.diff(dim=3).abs().amax((2, 3)) < 0.3 * steps).all()
        assert new_images.mean() == pytest.approx(images.float().mean().item(), rel=0.02)

    @pytest.mark.parametrize(("hflip", "vflip"), [(1, 0), (0, 1), (1, 1), (0, 0)])
    @pytest.mark.parametrize("affine", [0.0, 1.0])
    def test_a_mirror_image_exchanges_the_classes_of_swap(
        self, hflip: int, vflip: int, affine: float
    ) -> None:
        images, masks = scene()
        options = {**ALL_OFF, "hflip": hflip, "vflip": vflip, "affine": affine}
        plain = self.augment(options, images, masks, 3)
        swapped = self.augment({**options, "swap": [[1, 2]]}, images, masks, 3)
        assert torch.equal(plain[0], swapped[0])
        table = torch.arange(IGNORE_INDEX + 1)
        if hflip != vflip:  # both at once turn the image, and left stays left
            table[[1, 2]] = table[[2, 1]]
        assert torch.equal(swapped[1], table[plain[1]])
