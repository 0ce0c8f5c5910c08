import pickle
from typing import Any

import torch
from torch import Tensor

from segfit.tasks.segmentation.augmentation.cpu import CpuAugment
from tests.contracts.augmentation_contract import ALL_ON, AugmentationContract, scene


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
