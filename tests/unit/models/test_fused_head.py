"""The head's kernels against fp64, in Triton's interpreter; and what decides whether they run."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from segfit.models.layers import sum_by_products

pytest.importorskip("triton")
from segfit.models import fused_head

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs inside another test")
# A row longer than four blocks of pixels, more channels than a block, and sizes that are no multiples.
SIZES, DEPTH = ((2, 70), (2, 35), (1, 18), (1, 9)), 70


def some_maps(batch=1, depth=DEPTH, device="cpu", sizes=SIZES):
    torch.manual_seed(0)
    made = [torch.randn(batch, depth, *size, device=device) + 0.5 for size in sizes]
    return [one.to(memory_format=torch.channels_last) for one in made]


def some_norm(depth=DEPTH):
    norm = nn.BatchNorm2d(depth)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def relative(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_parity(maps, norm, p, tolerance):
    """Against fp64: result, gradients and running statistics, with the elements dropped that the kernels dropped."""
    exact_norm = copy.deepcopy(norm).double()
    leaves = [one.requires_grad_() for one in maps]
    out = fused_head.sum_norm_relu_dropout(leaves, norm, p)
    assert out.dtype == maps[0].dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = [one.detach().double().requires_grad_() for one in maps]
    positive = F.relu(exact_norm(sum_by_products(exact)))
    dropped = (out == 0) & (positive > 0)
    assert dropped.sum() / (positive > 0).sum() == pytest.approx(p, abs=0.05)
    expected = positive * ~dropped / (1 - p)
    weigh = torch.randn_like(out)
    found_grads = torch.autograd.grad(out, [*leaves, norm.weight, norm.bias], weigh)
    grads = torch.autograd.grad(
        expected, [*exact, exact_norm.weight, exact_norm.bias], weigh.double()
    )
    for one, other in zip((out, *found_grads), (expected, *grads), strict=True):
        assert relative(one, other) < tolerance
    for buffer, other in zip(norm.buffers(), exact_norm.buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), other.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="is running already")
def test_kernels_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@interpreted
def test_parity():
    assert_parity(some_maps(), some_norm(), 0.3, 1e-5)


@interpreted
def test_parity_in_half_precision():
    maps = some_maps(2, 40, sizes=((2, 5), (2, 3), (1, 2), (1, 1)))
    assert_parity([one.bfloat16() for one in maps], some_norm(40), 0.3, 0.01)


@interpreted
def test_the_seed_decides_what_is_dropped():
    maps, found = [one[..., :1, :9] for one in some_maps(depth=8)], []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(fused_head.sum_norm_relu_dropout(maps, some_norm(8), 0.5) == 0)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@interpreted
def test_they_run_only_where_they_are_equal_and_faster(monkeypatch):
    maps, norm = [one[..., :1, :5] for one in some_maps(2, 8)], some_norm(8)
    state, seeds = copy.deepcopy(norm.state_dict()), torch.get_rng_state()

    class Timer:
        """Runs what it is to time once, and gives times that were set, first the kernels'."""

        left: ClassVar[list[int]] = []

        def __init__(self, statement, globals):
            eval(statement, globals)
            self.mean = self.left.pop(0)

        def timeit(self, _):
            return self

    monkeypatch.setattr(fused_head, "Timer", Timer)
    verdicts = []
    for times in ([1, 2], [2, 1]):
        Timer.left[:] = times
        fused_head._decided.clear()
        verdicts += [fused_head.pay(maps, norm) for _ in range(2)]  # the second asks nothing
    assert verdicts == [True, True, False, False]
    assert all(torch.equal(state[name], value) for name, value in norm.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seeds)

    # wrong, it is not even timed
    right = fused_head.sum_norm_relu_dropout
    monkeypatch.setattr(fused_head, "sum_norm_relu_dropout", lambda *a: right(*a) * 1.01)
    assert not fused_head._equal_and_faster(maps, norm)
    monkeypatch.setattr(fused_head, "sum_norm_relu_dropout", lambda *a: 1 / 0)
    fused_head._decided.clear()
    assert not fused_head.pay(maps, norm)


@pytest.mark.skipif(INTERPRETED, reason="needs no kernels")
def test_who_wants_bits_to_repeat_gets_products(monkeypatch):
    """Which way is faster may change from run to run."""
    from segfit.models import segformer_fast  # not above: transformers takes seconds

    monkeypatch.setattr(fused_head, "pay", lambda *_: True)
    maps, norm = some_maps(), some_norm()
    assert segformer_fast.kernels(maps, norm) is None
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda"))
    assert segformer_fast.kernels(maps, norm) is fused_head
    torch.use_deterministic_algorithms(True)
    try:
        assert segformer_fast.kernels(maps, norm) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="the compiler's turn")
@pytest.mark.parametrize("capability", [75, 90, 120])
def test_kernels_compile_for(capability, monkeypatch):
    """Triton needs no card to compile for one."""
    import triton
    from triton.backends.compiler import GPUTarget

    compiled, run = [], triton.JITFunction.run

    class Driver:
        get_current_device = staticmethod(lambda: capability)
        get_current_stream = staticmethod(lambda _: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"])

    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    for dtype in (torch.float16, torch.float32):
        maps = [one.to(dtype).requires_grad_() for one in some_maps()]
        fused_head.sum_norm_relu_dropout(maps, some_norm(), 0.1).sum().backward()
    assert len(compiled) == 8
