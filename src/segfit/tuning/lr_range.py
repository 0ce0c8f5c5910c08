"""The LR range test, and a context that leaves a training as it was."""

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from segfit.assembly.training import Training
from segfit.data.batches import TrainBatches
from segfit.engine.fit import Fit
from segfit.engine.seeding import derive_seed
from segfit.engine.step import make_update
from segfit.engine.task import count_samples
from segfit.errors import SegFitError
from segfit.tuning.measure import windows

LEAST_UPDATES = 20  # fewer make no curve
_LEAST_POINTS = 5
_TIMED = 3  # updates after the first, to know how long one takes


@dataclass
class RangeTest:
    """The results of an LR range test; of each list an entry an update."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    # The losses' running mean, corrected for its start at 0: it lags behind, and decides when to stop.
    smoothed: list[float] = field(default_factory=list)
    diverged: bool = False  # whether the sweep ended because the loss did
    samples: int = 0  # of an update: the effective batch
    smoothing: float = 0.9  # weight (0-1) of the past in the running mean

    def curve(self) -> NDArray[np.float64]:
        """Return the loss smoothed from both sides, an entry an update.

        The mean of the running means of past and future, both corrected for their start: lagging behind, the fall
        would seem to come at rates that are too large. Losses past the lowest are cut off at the largest before it,
        so that a divergence does not reach back.
        """
        highest = max(self.losses[: int(np.argmin(self.smoothed)) + 1])
        losses = np.minimum(self.losses, highest)
        past, future = (running_mean(one, self.smoothing) for one in (losses, losses[::-1]))
        return (past + future[::-1]) / 2

    def steepest(self) -> int | None:
        """Return the update at which the smoothed loss falls fastest over the logarithm of the rate.

        The slope is that of a straight line through a tenth of the updates, centred, so that one batch decides
        nothing. Only what lies before the lowest smoothed loss counts. None if the loss falls by no more than twice
        what it fluctuates.
        """
        smoothed = self.curve()
        lowest = int(np.argmin(smoothed))
        noise = float(np.std(np.array(self.losses)[: lowest + 1] - smoothed[: lowest + 1]))
        half = max(2, len(smoothed) // 20)
        if lowest < half or smoothed[: lowest + 1].max() - smoothed[lowest] <= 2 * noise:
            return None
        logs = np.log(np.array(self.rates))
        slopes = {
            center: float(np.polyfit(logs[part], smoothed[part], 1)[0])
            for center in range(half, lowest + 1)
            for part in [slice(center - half, center + half + 1)]
        }
        return min(slopes, key=lambda center: slopes[center])


def running_mean(values: Iterable[float], smoothing: float) -> NDArray[np.float64]:
    """Return the exponential running mean of values (N,), corrected for its start at 0."""
    mean, means = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = smoothing * mean + (1 - smoothing) * float(value)
        means.append(mean / (1 - smoothing**count))
    return np.array(means)


def lr_range_test(
    training: Training,
    *,
    first: float,
    last: float,
    updates: int,
    smoothing: float,
    divergence: float,
    progress: Callable[[int], None] | None = None,
) -> RangeTest:
    """Train while the learning rate rises; `training` is changed by it, see `restored`.

    Its accumulation, clipping, precision and averages are in force. The other arguments are the options of
    benchmark=lr_find; `progress` is called with the updates made.

    Raises:
        SegFitError: if the loss diverges before there is a curve.
    """
    test = RangeTest(smoothing=smoothing)
    for samples, loss, rate in _updates(training.fit, first, last, updates):
        test.samples = samples
        smooth = float(running_mean([*test.losses, loss], smoothing)[-1])
        if not math.isfinite(smooth) or smooth > divergence * min([smooth, *test.smoothed]):
            test.diverged = True
            break
        test.rates.append(rate)
        test.losses.append(loss)
        test.smoothed.append(smooth)
        if progress is not None:
            progress(len(test.rates))
    if len(test.rates) < _LEAST_POINTS:
        raise SegFitError(
            f"benchmark.first={first:g}: the loss diverges within {_LEAST_POINTS} updates. Lower it."
        )
    return test


def _updates(
    fit: Fit, first: float, last: float, updates: int
) -> Iterator[tuple[int, float, float]]:
    """Make updates of whole windows while the rate rises by a constant factor; yield their samples, loss and rate."""
    state, begun = fit.state, fit.state.progress.update

    def rate(done: int) -> float:
        return float(first * (last / first) ** ((done - begun) / (updates - 1)))

    def step_update(done: int) -> None:
        for group in state.optimizer.param_groups:  # groups keep their rates' ratios
            group["lr"] = rate(done) * group.get("lr_scale", 1.0)

    step_update(begun)
    schedule: Any = SimpleNamespace(step_update=step_update)
    state.scheduler = schedule
    state.train()
    whole = min(fit.options.accumulate, fit.train.batches_per_epoch())
    full = (window for window in windows(fit) if len(window) == whole)
    for number, window in enumerate(islice(full, updates), start=1):
        seeds = [derive_seed(fit.options.seed, number, part) for part in range(len(window))]
        loss, *_ = make_update(state, fit.task, window, seeds, fit.options.clip_grad_norm)
        samples = sum(count_samples(batch) for batch in window)
        yield samples, float(loss), rate(begun + number - 1)  # synchronises: the next depends on it


def updates_within(training: Training, seconds: float) -> int:
    """Return how many updates a sweep can make in a time; `training` stays as it was."""
    with restored(training):
        updates = _updates(training.fit, 1e-9, 1e-8, 1 + _TIMED)
        times = [time.perf_counter() for _ in updates]
    return max(LEAST_UPDATES, int(seconds * _TIMED / (times[-1] - times[0])))


@contextmanager
def restored(training: Training) -> Iterator[None]:
    """Leave all that changes while training as it was, bit for bit.

    Model with all its buffers, optimizer, scaler, average, scheduler, progress, the generators of random numbers and
    where the sampler stands. Copies are kept on the host.
    """
    fit = training.fit
    state = fit.state
    assert isinstance(fit.train, TrainBatches)  # the only kind that the builders make
    sampler = fit.train.sampler
    modules = [module for module in (state.model, state.ema and state.ema.module) if module]
    kept = tree_map(_on_host, state.state_dict())
    buffers = [tree_map(_on_host, dict(module.named_buffers())) for module in modules]
    modes = [{name: part.training for name, part in module.named_modules()} for module in modules]
    scheduler, position = state.scheduler, copy.copy(vars(sampler))
    try:
        yield
    finally:
        state.scheduler = scheduler
        rates = [dict(group) for group in kept["optimizer"]["param_groups"]]
        state.optimizer.zero_grad(set_to_none=True)
        state.load_state_dict(kept)
        for group, before in zip(state.optimizer.param_groups, rates, strict=True):
            # load_state_dict asks the scheduler, whose rate may differ by rounding
            group["lr"] = before["lr"]
        for module, values, mode in zip(modules, buffers, modes, strict=True):
            for name, buffer in module.named_buffers():  # those too that a state dict leaves out
                buffer.copy_(values[name])
            for name, part in module.named_modules():
                part.training = mode[name]
        vars(sampler).update(position)


def _on_host(value: Any) -> Any:
    return value.to("cpu", copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)
