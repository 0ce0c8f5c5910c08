import copy

import pytest
import torch
from torch import Tensor, nn

from segfit.models.restorers import make_restorer

NAMES = ("cnn", "nafnet")
SIZES = [(1, 1), (2, 9), (48, 64), (33, 50)]


def images(*size: int, channels: int = 3, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(sum(size))
    return torch.rand(batch, channels, *size, generator=generator)


def make(name: str, channels: int = 3, *, trained: bool = True, **options: object) -> nn.Module:
    """Away from its initialisation, where zeros hide what is not connected."""
    torch.manual_seed(0)
    values = {"name": name, "base_channels": 8, "num_blocks": 1, "checkpointing": False}
    model = make_restorer(channels, {**values, **options})
    if trained:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_comes_out_as_it_went_in(name: str, channels: int, size: tuple[int, int]) -> None:
    batch = images(*size, channels=channels)
    with torch.no_grad():
        restored = make(name, channels).eval()(batch)
    assert restored.shape == batch.shape
    assert restored.isfinite().all()
    assert not torch.equal(restored, batch)


@pytest.mark.parametrize("name", NAMES)
def test_untrained_it_changes_nothing(name: str) -> None:
    batch = images(40, 24)
    assert torch.equal(make(name, trained=False)(batch), batch)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name: str) -> None:
    model = make(name)
    model(images(32, 48)).square().mean().backward()
    unreached = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name: str) -> None:
    batch, gradients = images(32, 32), []
    for checkpointing in (False, True):
        model = make(name, checkpointing=checkpointing)
        loss = model(batch).square().mean()
        saved = sum(tensor.numel() for tensor in saved_tensors(model, batch))
        loss.backward()
        gradients.append((saved, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(gradients[1][1], gradients[0][1])
    assert gradients[1][0] < gradients[0][0]


def saved_tensors(model: nn.Module, batch: Tensor) -> list[Tensor]:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    return saved


@pytest.mark.parametrize("name", NAMES)
def test_num_blocks_and_base_channels_set_depth_and_width(name: str) -> None:
    def blocks(model: nn.Module) -> int:
        return sum(type(m).__name__.endswith("Block") for m in model.modules())

    one, three = make(name), make(name, num_blocks=3, base_channels=12)
    assert blocks(three) == 3 * blocks(one)
    assert next(three.parameters()).shape[0] == 12


@pytest.mark.parametrize("name", NAMES)
def test_channels_last_and_pictures_alone_give_the_same(name: str) -> None:
    model, batch = make(name).eval(), images(40, 56)
    with torch.no_grad():
        expected = model(batch)
        model = model.to(memory_format=torch.channels_last)
        found = model(batch.to(memory_format=torch.channels_last))
        alone = model(batch[:1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone, expected[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_in_the_residual(name: str, dtype: torch.dtype) -> None:
    model, batch = make(name), images(32, 32)
    with torch.autocast("cpu", dtype):
        restored = model(batch)
    assert restored.dtype == torch.float32
    restored.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        full = model(batch)
    assert (restored - full).norm() / (full - batch).norm() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_computes_the_same(name: str) -> None:
    model, batch = make(name).eval(), images(16, 16)
    other = make(name, trained=False).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = model(batch)
        assert torch.equal(other(batch), expected)
        assert torch.equal(copy.deepcopy(model)(batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_compiled_it_is_one_graph_that_computes_the_same(name):
    """Up to the kernels, which take minutes to be made."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    model, batch = make(name, base_channels=4), images(32, 32)
    compiled, found = torch.compile(model, backend="aot_eager"), []
    for forward in (model, compiled):
        model.zero_grad()
        restored = forward(batch)
        restored.square().mean().backward()
        found.append((restored.detach(), [p.grad.clone() for p in model.parameters()]))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
