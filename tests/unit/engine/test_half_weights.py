"""Weights copied to bf16 at once give the bits that autocast's own casts give."""

import pytest
import torch

from segfit.assembly.state import frozen
from segfit.engine.compiling import HalfWeights
from segfit.models.cnn import CNN
from segfit.models.segformer import make_segformer


def segformer(**options):
    torch.manual_seed(0)
    return make_segformer("b0", 3, weights=None, dropout=0.0, drop_path=0.0, **options)[0]


def passes(model, forward):
    """Return the output and the gradients of a pass in bf16."""
    model.zero_grad()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        output = forward(torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last))
    output.float().square().mean().backward()
    return output, {name: one.grad for name, one in model.named_parameters()}


@pytest.mark.parametrize("name", ["cnn", "segformer", "stock", "checkpointing"])
def test_outputs_and_gradients_are_autocasts(name):
    kinds = {"segformer": {}, "stock": {"fast": False}, "checkpointing": {"checkpointing": True}}
    torch.manual_seed(0)
    model = (
        CNN(3, base_channels=8, num_blocks=1, dropout=0.0)
        if name == "cnn"
        else segformer(**kinds[name])
    )
    half = HalfWeights(model)
    expected, gradients = passes(model, model)
    output, found = passes(model, half)
    assert torch.equal(output, expected)
    for key, gradient in gradients.items():
        assert found[key].dtype == torch.float32, key
        # What is used twice is added up in bf16.
        torch.testing.assert_close(
            found[key], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max()
        )
    if name in ("cnn", "stock"):
        assert all(torch.equal(found[key], one) for key, one in gradients.items())


def test_frozen_and_unused_weights_get_no_gradient():
    model = torch.nn.ModuleDict(
        {one: torch.nn.Linear(4, 4) for one in ("used", "frozen", "unused")}
    )
    model.forward = lambda x: model["used"](model["frozen"](x))
    model["frozen"].requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        HalfWeights(model)(torch.ones(2, 4)).sum().backward()
    got = {name for name, one in model.named_parameters() if one.grad is not None}
    assert got == {"used.weight", "used.bias"}


@pytest.mark.parametrize(
    "pattern",
    [
        "decode_head.linear_fuse",
        "decode_head.linear_projections",
        r"segformer|decode_head\.linear_p",
    ],
)
def test_the_fast_segformers_head_may_be_partly_frozen(pattern: str) -> None:
    model = segformer()
    for weight in frozen(model, pattern):
        weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        HalfWeights(model)(torch.randn(2, 3, 64, 64)).float().sum().backward()
    assert all((one.grad is not None) == one.requires_grad for one in model.parameters())
