"""What does not compile runs eager, the reason is told, and the probe leaves no trace."""

import pytest
import torch
from torch import nn

from segfit.engine.compiling import compiled_or_eager
from segfit.engine.precision import Precision

FP32 = Precision("fp32", "cpu")


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_a_failure_falls_back_with_its_reason_and_without_a_trace(model, monkeypatch):
    def fails_after_a_pass(module):
        def forward(images):
            module(images)  # moves the statistics of batch norm and the random numbers
            raise RuntimeError("no C++ compiler found\nand much more")

        return forward

    monkeypatch.setattr(torch, "compile", fails_after_a_pass)
    example = torch.randn(2, 3, 8, 8)
    before, random = snapshot(model), torch.get_rng_state()
    forward, reason = compiled_or_eager(model, example, FP32)
    assert forward is model
    assert reason is not None
    assert "running eager (no C++ compiler found)" in reason
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_success_restores_buffers_gradients_and_random_numbers(model, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: lambda images: module(images))
    example = torch.randn(2, 3, 8, 8)
    before, random = snapshot(model), torch.get_rng_state()
    forward, reason = compiled_or_eager(model, example, FP32)
    assert reason is None
    assert forward is not model
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
