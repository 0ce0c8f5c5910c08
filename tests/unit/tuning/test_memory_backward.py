"""The walk of the graph in Python does what torch's engine does."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import GraphExecGroup, checkpoint

from segfit.models.layers import relu_dropout_
from segfit.tuning.memory.backward import backward
from segfit.tuning.memory.predict import undisturbed
from segfit.tuning.memory.pretend import Rules, without_data
from segfit.tuning.memory.recorder import MemoryRecorder


class Residual(nn.Module):
    """Shared inputs, a parameter that is used twice, broadcasting, a norm, an in-place custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.norm, self.scale = nn.BatchNorm2d(8), nn.Parameter(torch.rand(8, 1, 1))
        self.unused = nn.Parameter(torch.rand(3))

    def forward(self, x):
        x = self.first(x)
        x = x + self.second(F.relu(self.norm(x))) * self.scale + self.scale
        x, _ = relu_dropout_(x.clone(), 0.0)
        x = checkpoint(self.second, x, use_reentrant=False)
        parts = x.chunk(2, dim=1)
        return torch.cat([parts[0] * parts[1], x.double().float()], dim=1)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if gradient is None:
            assert ours[name] is None
        else:
            torch.testing.assert_close(ours[name], gradient)
            assert ours[name].stride() == gradient.stride()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_those_of_the_engine(layout):
    torch.manual_seed(0)
    model = Residual().to(memory_format=layout)
    images = torch.rand(2, 3, 8, 8).contiguous(memory_format=layout)
    model(images).square().mean().backward()
    theirs = gradients(model)
    with GraphExecGroup():
        loss = model(images).square().mean()
        backward([(loss.grad_fn, torch.ones_like(loss))])
    assert_same(gradients(model), theirs)


def test_gradients_add_up_over_micro_batches():
    torch.manual_seed(0)
    model, batches = Residual(), torch.rand(3, 2, 3, 8, 8)
    for images in batches:
        model(images).square().mean().backward()
    theirs = gradients(model)
    for images in batches:
        with GraphExecGroup():
            loss = model(images).square().mean()
            backward([(loss.grad_fn, torch.ones_like(loss))])
    assert_same(gradients(model), theirs)


def test_cuts_change_nothing_but_who_holds_the_graph():
    torch.manual_seed(0)
    model, images = Residual(), torch.rand(2, 3, 8, 8)
    model(images).square().mean().backward()
    theirs = gradients(model)
    rules = Rules(cuda=False)
    with GraphExecGroup(), rules:
        outputs = rules.cut(model(images))
        loss = rules.cut(outputs.square().mean())
        (loss * 1.0).backward()  # GradScaler multiplies like this
        assert outputs.grad_fn is None
    assert_same(gradients(model), theirs)


def test_what_a_node_saved_is_freed_as_the_walk_passes_it():
    layers = [nn.Linear(64, 64) for _ in range(8)]
    rules = Rules(cuda=False)
    with MemoryRecorder("cpu") as recorder, rules:
        x = torch.rand(1000, 64)
        for layer in layers:
            x = layer(x).tanh()
        x = rules.cut(x)
        (x.sum() * 1.0).backward()
    peak = recorder.living().sum(1).max()
    kept = 9 * x.nbytes  # the input and one result a layer; gradients come as results go
    assert kept < peak < kept + 5 * x.nbytes


def test_what_deterministic_operations_are_made_of_is_counted():
    def taken(wanted: bool) -> int:
        recorder = MemoryRecorder("cuda")
        with undisturbed(wanted), without_data(recorder):
            F.interpolate(torch.empty(2, 8, 16, 16), (64, 64), mode="bilinear")
        return sum(recorder.sizes.values())

    assert taken(True) > 2 * taken(False)
    assert not torch.are_deterministic_algorithms_enabled()
