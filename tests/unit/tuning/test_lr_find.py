"""A range test suggests the rate at which the loss falls fastest."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from segfit.assembly.training import Training, make_training
from segfit.config.benchmark import LrFindConfig
from segfit.errors import SegFitError
from segfit.tuning.lr_find import RangeTest, lr_range_test, running_mean, updates_within
from tests.integration.training import compose_run
from tests.unit.engine.fakes import weights


def swept(
    training: Training, progress: Callable[[int], None] = lambda _: None, **options: Any
) -> RangeTest:
    chosen = LrFindConfig(**{"last": 10.0, "updates": 12, **options})
    return lr_range_test(training, chosen, chosen.updates, progress)


def build(tmp_path, *overrides: str) -> Training:
    config = compose_run(
        "scheduler=cosine", "scheduler.warmup=0.2", "ema_decay=0.9", "accumulate=2", "batch_size=2",
        "image_size=32", "augmentation=kornia-gpu", "augmentation.cutmix=0.5",
        *overrides,
    )  # fmt: skip
    training = make_training(config, tmp_path, lambda _: None)
    state = training.fit.state
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    return training


def test_the_time_of_an_update_is_measured_without_training(tmp_path):
    training = build(tmp_path)
    before = weights(training.fit.state.model)
    assert updates_within(training, 0.001) == 20
    assert torch.allclose(weights(training.fit.state.model), before, atol=1e-6)


def test_rates_rise_by_a_factor_and_keep_the_groups_ratio(tmp_path, monkeypatch):
    training = build(tmp_path)
    groups = training.fit.state.optimizer.param_groups
    groups[0]["lr_scale"], seen = 3.0, []

    def progress(_: int) -> None:
        seen.append([group["lr"] for group in groups])

    sweep = swept(training, progress, divergence=1e9, updates=8, last=1e-3)
    assert sweep.rates == pytest.approx([1e-6 * 10 ** (3 * step / 7) for step in range(8)])
    assert not sweep.diverged
    assert sweep.samples == 4  # 2 × 2
    assert [rates[0] for rates in seen] == pytest.approx([3 * rate for rate in sweep.rates])
    assert [rates[1] for rates in seen] == pytest.approx(sweep.rates)


def test_the_mean_is_corrected_for_its_start(tmp_path):
    sweep = swept(build(tmp_path), updates=6, last=1e-5)
    smoothed = running_mean(sweep.losses, 0.9)
    assert smoothed[0] == pytest.approx(sweep.losses[0])
    weights = np.array([0.9**age for age in range(5, -1, -1)])
    assert smoothed[5] == pytest.approx(float(weights @ sweep.losses / weights.sum()))


def test_divergence_ends_the_sweep(tmp_path):
    training = build(
        tmp_path,
        "optimizer=sgd",
        "clip_grad_norm=null",
        *("augmentation=none", "augmentation.cutmix=0"),
    )
    training.fit.state.scaler = torch.amp.GradScaler("cpu", enabled=False)
    sweep = swept(training, first=1e-3, last=1e9, updates=40)
    assert sweep.diverged
    assert 5 <= len(sweep.rates) < 40
    smoothed = running_mean(sweep.losses, 0.9)
    assert max(smoothed) <= 4 * min(smoothed) or math.isfinite(max(smoothed))
    with pytest.raises(SegFitError, match=r"benchmark\.first=1e\+10: the loss diverges"):
        swept(training, first=1e10, last=1e20, updates=10)


def curve(falls_at: float, noise: float, drop: float = 1.0) -> RangeTest:
    """Return a sweep whose loss falls by `drop` around a rate and explodes past 0.1."""
    rates = np.geomspace(1e-6, 1, 100)
    losses = 2 - drop / (1 + falls_at / rates) + 50 * np.maximum(0, np.log10(rates / 0.1))
    losses += noise * np.random.default_rng(0).standard_normal(100)
    return RangeTest(rates.tolist(), losses.tolist())


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("rate", [1e-4, 3e-3])
def test_the_steepest_fall_is_found_in_noise(rate, noise):
    sweep = curve(rate, noise)
    steepest = sweep.steepest()
    assert steepest is not None
    assert rate / 3 < sweep.rates[steepest] < rate * 3


def test_noise_alone_is_no_fall():
    assert curve(1e-3, 0.3, drop=0.05).steepest() is None
    numbers = np.random.default_rng(1).standard_normal(100)
    flat = RangeTest(np.geomspace(1e-6, 1, 100).tolist(), numbers.tolist())
    assert flat.steepest() is None
    rising = RangeTest([1e-3, 1e-2, 1e-1], [1.0, 2.0, 3.0])
    assert rising.steepest() is None
