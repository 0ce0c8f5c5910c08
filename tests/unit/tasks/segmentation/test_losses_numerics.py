"""Losses of logits in half precision, and of extreme ones: as exact as in higher precision, and finite."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.losses import SegmentationLoss
from segfit.tasks.segmentation.schema import LossConfig
from tests.unit.tasks.segmentation.losses import (
    CLASSES,
    NAMES,
    WEIGHTS,
    batch,
    make,
    soft,
    value,
)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_of_a_large_image_do_not_overflow(name: str) -> None:
    targets = torch.zeros(1, 512, 512, dtype=torch.int64)  # 262144 pixels; fp16 ends at 65504
    targets[:, :256] = 1
    logits = torch.randn(1, CLASSES, 512, 512, generator=torch.Generator().manual_seed(0))
    loss = make(name)
    expected = value(loss, logits.half().float(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        result = value(loss, logits.half(), targets)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected)


EXTREME = 6e4  # close to the largest number of fp16


def extreme(
    dtype: torch.dtype, *, classes: int, side: int, batch: int = 2
) -> tuple[Tensor, Tensor]:
    """Logits as far apart as half precision has them, right and wrong; hard targets, some ignored."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, classes, (batch, side, side), generator=generator)
    logits = torch.randint(-1, 2, (batch, classes, side, side), generator=generator) * EXTREME
    logits[1] = torch.randn(
        classes, side, side, generator=generator
    )  # an image as they usually are
    targets[torch.rand(targets.shape, generator=generator) < 0.1] = IGNORE_INDEX
    return logits.to(dtype), targets


def loss_and_gradient(
    loss: SegmentationLoss, logits: Tensor, targets: Tensor, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    found = value(loss, logits, targets)
    (found * scale).backward()
    assert logits.grad is not None
    return found.detach(), logits.grad.double() / scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_of_512_pixels_are_as_exact_as_in_float64(
    name: str, dtype: torch.dtype
) -> None:
    loss = make(name, class_weights=WEIGHTS)
    logits, targets = extreme(dtype, classes=CLASSES, side=512)
    # As training does: without the scaler's factor most of the gradient is too small for fp16.
    found, gradient = loss_and_gradient(loss, logits, targets, scale=65536)
    expected, exact = loss_and_gradient(loss, logits.double(), targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert gradient.isfinite().all()
    rounding = torch.finfo(dtype).eps * exact.abs().max().item()
    torch.testing.assert_close(gradient, exact, rtol=0.02, atol=rounding)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_logits_of_many_classes_and_of_shares(name: str) -> None:
    loss = SegmentationLoss(LossConfig(name), 150)
    logits, hard = extreme(torch.float16, classes=150, side=32)
    ones = (hard.unsqueeze(1) == torch.arange(150).view(1, -1, 1, 1)).float()
    mixed = 0.3 * ones + 0.7 * ones.roll(1, 0)  # MixUp
    mixed = mixed * (mixed.sum(1, keepdim=True) > 0.99)
    for targets in (hard, mixed):
        found, gradient = loss_and_gradient(loss, logits, targets)
        expected, _ = loss_and_gradient(
            loss, logits.double(), targets.double() if targets.ndim == 4 else targets
        )
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("only", [0, IGNORE_INDEX], ids=["one class", "all ignored"])
def test_extreme_logits_where_one_value_is_all_there_is(name: str, only: int) -> None:
    logits, targets = extreme(torch.float16, classes=CLASSES, side=32)
    found, gradient = loss_and_gradient(make(name), logits, torch.full_like(targets, only))
    assert found.isfinite()
    assert gradient.isfinite().all()
    if only == IGNORE_INDEX:
        assert found == 0
        assert not gradient.any()


class Precisions(TorchDispatchMode):
    """Notes the type of every floating result but those of conversions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.is_floating_point() and "copy" not in str(func):
            self.seen.add(result.dtype)
        return result


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_autocast_lowers_nothing_of_a_loss(name: str, dtype: torch.dtype, kind: str) -> None:
    logits, hard = batch()
    logits, targets = logits.to(dtype), hard if kind == "hard" else soft(hard)
    loss = make(name, class_weights=WEIGHTS, label_smoothing=0.1)
    expected = value(loss, logits, targets)
    with torch.autocast("cpu", dtype), Precisions() as precisions:
        found = value(loss, logits, targets)
    assert precisions.seen == {torch.float32}
    assert torch.equal(found, expected)
