from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segfit.engine.precision import Precision
from segfit.errors import SegFitError
from segfit.tasks.restoration.losses import RestorationLoss
from segfit.tasks.restoration.schema import LossConfig

NAMES = ("charbonnier", "l1", "mse", "psnr")
FP32, BF16 = Precision("fp32", "cpu"), Precision("bf16", "cpu")
ENCODER = "test_resnet"  # timm's tiny one


def batch(channels: int = 3, pictures: int = 4, side: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(pictures, channels, side, side + 8, generator=generator)
    errors = 0.1 * torch.randn(targets.shape, generator=generator)
    errors *= torch.arange(1, pictures + 1).view(-1, 1, 1, 1) / pictures
    return targets + errors, targets


def made(name: str, precision: Precision = FP32, **options: Any) -> RestorationLoss:
    return RestorationLoss(LossConfig(name, **options), precision)


def value(loss: RestorationLoss, outputs: Tensor, targets: Tensor) -> Tensor:
    return loss(outputs, targets, loss.totals(targets))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of an encoder, as good as pretrained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.save(timm.create_model(ENCODER).state_dict(), path)
    return path


def perceptual(file: Path, precision: Precision = FP32, weight: float = 0.1) -> RestorationLoss:
    return made("l1", precision, perceptual=weight, encoder=ENCODER, weights=str(file))


def test_values_by_hand() -> None:
    outputs, targets = batch()
    error = (outputs - targets).double().numpy()
    expected = {
        "l1": np.abs(error).mean(),
        "mse": (error**2).mean(),
        "charbonnier": np.sqrt(error**2 + 1e-6).mean(),
        "psnr": 10 * np.log10((error**2).mean((1, 2, 3)) + 1e-8).mean(),
    }
    for name in NAMES:
        found = value(made(name), outputs, targets)
        assert found.item() == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "perceptual"])
def test_micro_batches_add_up_to_the_big_batch(name: str, file: Path) -> None:
    outputs, targets = batch()
    loss = perceptual(file) if name == "perceptual" else made(name)

    whole = outputs.clone().requires_grad_()
    expected = value(loss, whole, targets)
    expected.backward()

    parts = outputs.clone().requires_grad_()
    splits = (slice(0, 1), slice(1, 4))
    totals = torch.stack([loss.totals(targets[split]) for split in splits]).sum(0)
    accumulated = torch.zeros(())
    for split in splits:
        part = loss(parts[split], targets[split], totals)
        part.backward()
        accumulated += part.detach()

    torch.testing.assert_close(accumulated, expected.detach())
    torch.testing.assert_close(parts.grad, whole.grad, rtol=1e-4, atol=1e-8)
    assert whole.grad is not None
    assert whole.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_function(name: str) -> None:
    outputs, targets = (tensor[:2, :, :3, :3].double() for tensor in batch())
    loss = made(name)
    totals = loss.totals(targets)
    assert torch.autograd.gradcheck(
        lambda leaf: loss(leaf, targets, totals), outputs.requires_grad_()
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_perceptual_compares_features(file: Path, channels: int) -> None:
    outputs, targets = batch(channels)
    loss, plain = perceptual(file), made("l1")

    def term(pictures: Tensor) -> float:
        return float(value(loss, pictures, targets) - value(plain, pictures, targets))

    assert term(targets) == 0
    near, far = term(targets + (outputs - targets) / 4), term(outputs)
    assert 0 < near < far
    doubled = value(perceptual(file, weight=0.2), outputs, targets)
    assert float(doubled - value(plain, outputs, targets)) == pytest.approx(2 * far, rel=1e-3)


@pytest.mark.parametrize("encoder", ["test_mambaout", "test_vit"])  # channels last; one stride
def test_perceptual_takes_features_of_any_layout(encoder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(timm.create_model(encoder).state_dict(), tmp_path / "encoder.pth")
    file = str(tmp_path / "encoder.pth")
    loss = made("l1", perceptual=1.0, encoder=encoder, weights=file)
    assert loss.perceptual is not None
    network: Any = loss.perceptual.encoder
    outputs, targets = (pictures[..., :32, :32] for pictures in batch())
    assert value(loss, targets, targets) == 0

    mean, std = (torch.tensor(network.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    features = [network((pictures - mean) / std) for pictures in (outputs, targets)]
    expected = value(made("l1"), outputs, targets)
    widths = network.feature_info.channels()
    for one, other, width in zip(*features, widths, strict=True):
        (axis,) = (axis for axis in (1, 3) if one.shape[axis] == width)
        units = [part / part.norm(dim=axis, keepdim=True) for part in (one, other)]
        expected += (units[0] - units[1]).square().sum(axis).mean() / len(widths)
    torch.testing.assert_close(value(loss, outputs, targets), expected, rtol=1e-4, atol=1e-6)


def test_perceptual_runs_in_the_steps_precision_and_trains_nothing(file: Path) -> None:
    outputs, targets = batch()
    loss = perceptual(file, BF16)
    seen: list[torch.dtype] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                seen.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    before = {key: tensor.clone() for key, tensor in loss.state_dict().items()}
    leaf = outputs.requires_grad_()
    with Watch():
        found = value(loss, leaf, targets)
    found.backward()
    assert set(seen) == {torch.bfloat16}
    assert found.dtype == torch.float32
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert all(p.grad is None for p in loss.parameters())
    assert all(torch.equal(before[key], t) for key, t in loss.state_dict().items())
    full = value(perceptual(file, FP32), outputs, targets)
    assert found.item() == pytest.approx(full.item(), rel=0.05)


def test_never_random_features_in_silence(tmp_path: Path) -> None:
    with pytest.raises(SegFitError) as caught:
        made("l1", perceptual=0.1, encoder="vgg16")
    message = str(caught.value)
    assert message.startswith("loss.weights=timm/vgg16.tv_in1k: not in the cache")
    assert "hf download timm/vgg16.tv_in1k" in message
    assert "loss.perceptual=0" in message
    assert "model." not in message
    for encoder, weights, words in (
        ("vgg61", "auto", "loss.encoder=vgg61: timm knows no such model"),
        (ENCODER, str(tmp_path / "none.pth"), "none.pth: no such file or folder"),
    ):
        with pytest.raises(SegFitError, match=words):
            made("l1", perceptual=0.1, encoder=encoder, weights=weights)
