"""Seeds: the same everywhere, another for every purpose."""

import random

import numpy as np
import pytest
import torch

from segfit.engine.state import derive_seed, random_state, seed_everything, set_random_state

CPU = torch.device("cpu")


def draw() -> list[float]:
    return [
        random.random(),
        float(np.random.rand()),
        float(np.random.randn()),
        float(torch.rand(())),
    ]


@pytest.fixture(autouse=True)
def _restored():
    state = random_state(CPU)
    flags = torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()
    yield
    set_random_state(state, CPU)
    torch.backends.cudnn.benchmark = flags[0]
    torch.use_deterministic_algorithms(flags[1])


def test_derived_seeds_are_fixed_for_all_time():
    assert derive_seed(0, 0, 0) == 2278555635313361279
    assert derive_seed(1, 2) != derive_seed(12)


def test_derived_seeds_differ_and_are_63_bit():
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_sets_all_three_generators():
    seed_everything(3, deterministic=False)
    first = draw()
    seed_everything(3, deterministic=False)
    assert draw() == first
    seed_everything(4, deterministic=False)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize("card", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_switches_torch(deterministic, card, monkeypatch):
    """And off the fused kernels of attention on a card, whose backward is not deterministic while torch only warns."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    off = []
    for name in ("flash", "mem_efficient", "cudnn"):
        monkeypatch.setattr(torch.backends.cuda, f"enable_{name}_sdp", off.append)
    seed_everything(0, deterministic)
    assert off == [False] * (3 if deterministic and card else 0)
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.backends.cudnn.benchmark is not deterministic


def test_the_state_of_the_generators_goes_through_a_checkpoint(tmp_path):
    seed_everything(5, deterministic=False)
    draw()  # leaves half a pair of normal numbers with NumPy
    torch.save(random_state(CPU), tmp_path / "random.pt")
    expected = [draw(), draw()]
    set_random_state(torch.load(tmp_path / "random.pt", weights_only=True), CPU)
    assert [draw(), draw()] == expected
