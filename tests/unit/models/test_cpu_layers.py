"""Linear layers by oneDNN give what F.linear gives."""

import pytest
import torch
import torch.nn.functional as F

from segfit.models import cpu_layers as module
from segfit.models.cpu_layers import FastLinear, linear


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request, monkeypatch):
    monkeypatch.setattr(module, "onednn_multiplies_faster", lambda: request.param)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("shape", [(2, 37, 24), (2, 5, 7, 24), (1, 1, 24)])
def test_values_and_gradients_are_those_of_f_linear(shape):
    torch.manual_seed(0)
    layer = FastLinear(24, 40)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(*shape[:-1], 40)
    results = []
    for forward in (layer, lambda t: F.linear(t, layer.weight, layer.bias)):
        y = forward(x)
        results.append((y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)))
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)
        assert ours.shape == torchs.shape


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    x, weight = torch.randn(2, 9, 16, dtype=dtype), torch.randn(8, 16, dtype=dtype)
    assert torch.equal(linear(x, weight), F.linear(x, weight))


@pytest.mark.usefixtures("library")
def test_autocast_decides_the_dtype():
    x, weight = torch.randn(2, 9, 16), torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
