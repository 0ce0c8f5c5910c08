"""benchmark=lr_find: the learning-rate range test (Smith, arXiv 1506.01186)."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import DictConfig
from scipy.signal import savgol_filter

from segfit.assembly.training import Training, make_training
from segfit.config.benchmark import LrFindConfig
from segfit.engine.findings import Cell, Findings, Table, columns
from segfit.engine.fit import Fit
from segfit.engine.state import derive_seed
from segfit.engine.step import make_update
from segfit.engine.task import count_samples
from segfit.errors import SegFitError
from segfit.tuning import Bench
from segfit.tuning.measure import explain_out_of_memory, windows

LEAST_UPDATES = 20  # fewer make no curve
_LEAST_POINTS = 5
_TIMED = 3  # updates after the first, to know how long one takes


@dataclass
class RangeTest:
    """The results of an LR range test; of each list an entry an update."""

    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    diverged: bool = False  # whether the sweep ended because the loss did
    samples: int = 0  # of an update: the effective batch
    smoothing: float = 0.9  # weight (0-1) of the past in the running mean

    def curve(self) -> NDArray[np.float64]:
        """Return the loss smoothed from both sides, an entry an update.

        The mean of the running means of past and future, both corrected for their start: lagging behind, the fall
        would seem to come at rates that are too large. Losses past the lowest are cut off at the largest before it,
        so that a divergence does not reach back.
        """
        lowest = int(np.argmin(running_mean(self.losses, self.smoothing)))
        losses = np.minimum(self.losses, max(self.losses[: lowest + 1]))
        past, future = (running_mean(one, self.smoothing) for one in (losses, losses[::-1]))
        return (past + future[::-1]) / 2

    def steepest(self) -> int | None:
        """Return the update at which the smoothed loss falls fastest over the logarithm of the rate.

        The slope is that of a straight line through a tenth of the updates, centred, so that one batch decides nothing. Only
        what lies before the lowest smoothed loss counts. None if the loss falls by no more than twice what it fluctuates.
        """
        smoothed = self.curve()
        lowest = int(np.argmin(smoothed))
        fall = smoothed[: lowest + 1]
        noise = np.std(self.losses[: lowest + 1] - fall)
        half = max(2, len(smoothed) // 20)
        if lowest < half or fall.max() - fall[-1] <= 2 * noise:
            return None
        slopes = savgol_filter(smoothed, 2 * half + 1, polyorder=1, deriv=1)
        return half + int(np.argmin(slopes[half : lowest + 1]))


def running_mean(values: Iterable[float], smoothing: float) -> NDArray[np.float64]:
    """Return the exponential running mean of values (N,), corrected for its start at 0."""
    means: NDArray[np.float64] = pd.Series(values).ewm(alpha=1 - smoothing).mean().to_numpy()
    return means


def run(config: DictConfig, bench: Bench) -> Findings:
    """Sweep the learning rate and suggest one; the weights that it trained are thrown away."""
    options = config.benchmark
    if options.first >= options.last:
        raise SegFitError(
            f"benchmark.first={options.first:g}: must be below benchmark.last={options.last:g}."
        )
    training = make_training(config, bench.folder, bench.notice)
    updates = options.updates
    with explain_out_of_memory(config):
        if config.seconds is not None:
            updates = updates_within(training, config.seconds)
        test = lr_range_test(
            training, options, updates, lambda done: bench.progress("the sweep", done, updates)
        )
    return _findings(config, test, training.facts)


def lr_range_test(
    training: Training, options: LrFindConfig, updates: int, progress: Callable[[int], None]
) -> RangeTest:
    """Train while the learning rate rises; `training` is of no use afterwards.

    Its accumulation, clipping, precision and averages are in force; `progress` is called with the updates made, at most
    `updates`. Raise a SegFitError if the loss diverges before there is a curve.
    """
    test, least = RangeTest(smoothing=options.smoothing), math.inf
    for samples, loss, rate in _updates(training.fit, options.first, options.last, updates):
        test.samples = samples
        smooth = float(running_mean([*test.losses, loss], options.smoothing)[-1])
        least = min(least, smooth)
        if not math.isfinite(loss) or smooth > options.divergence * least:
            test.diverged = True
            break
        test.rates.append(rate)
        test.losses.append(loss)
        progress(len(test.rates))
    if len(test.rates) < _LEAST_POINTS:
        raise SegFitError(
            f"benchmark.first={options.first:g}: the loss diverges within {_LEAST_POINTS} updates. Lower it."
        )
    return test


def _updates(
    fit: Fit, first: float, last: float, updates: int
) -> Iterator[tuple[int, float, float]]:
    """Make updates of whole windows while the rate rises by a constant factor; yield their samples, loss and rate."""
    state = fit.state
    schedule: Any = SimpleNamespace(step_update=lambda _: None)  # the rate is set here
    state.scheduler = schedule
    state.train()
    whole = min(fit.options.accumulate, fit.train.batches_per_epoch())
    full = (window for window in windows(fit) if len(window) == whole)
    rates = np.geomspace(first, last, updates).tolist()
    for number, (rate, window) in enumerate(zip(rates, full, strict=False), start=1):
        for group in state.optimizer.param_groups:  # groups keep their rates' ratios
            group["lr"] = rate * group.get("lr_scale", 1.0)
        seeds = [derive_seed(fit.options.seed, number, part) for part in range(len(window))]
        loss, *_ = make_update(state, fit.task, window, seeds, fit.options.clip_grad_norm)
        # synchronises: whether there is another update depends on it
        yield sum(map(count_samples, window)), float(loss), rate


def updates_within(training: Training, seconds: float) -> int:
    """Return how many updates a sweep can make in a time, by some at a rate that changes next to nothing."""
    times = [time.perf_counter() for _ in _updates(training.fit, 1e-9, 1e-8, 1 + _TIMED)]
    return max(LEAST_UPDATES, int(seconds * _TIMED / (times[-1] - times[0])))


def _findings(config: DictConfig, test: RangeTest, facts: dict[str, str]) -> Findings:
    rates, curve, steepest = test.rates, test.curve(), test.steepest()
    minimum = int(np.argmin(curve))
    rate: float | None = None
    fall: list[Cell] = [None, None]
    headline = (
        "The loss never clearly falls in this sweep: its fall is no larger than what it fluctuates from batch to "
        "batch. Raise benchmark.updates, or accumulate for a larger effective batch."
    )
    if steepest is not None:
        fall = [rates[steepest], float(curve[steepest])]
        rate = float(f"{rates[steepest]:.1e}")  # more would be a precision that the test lacks
        headline = (
            f"lr={rate:g}: there the loss falls fastest. It holds for an effective batch of {test.samples} "
            f"(batch_size={config.batch_size}, accumulate={config.accumulate}), {config.optimizer.name} and this model. "
            f"Type: lr={rate:g}"
        )
        if not test.diverged:
            headline += f"\nNothing diverged up to lr={rates[-1]:g}: benchmark.last may be raised."
    rows: list[list[Cell]] = [
        ["steepest fall", *fall],
        ["lowest loss", rates[minimum], float(curve[minimum])],
        ["a tenth of that", rates[minimum] / 10, None],
        ["diverged" if test.diverged else "end, not diverged", rates[-1], None],
        ["lr of the config", float(config.lr), None],
    ]
    title = f"Sweep of {len(rates)} updates, effective batch {test.samples}"
    shown = columns("where | lr:.2e | smoothed loss:.4f")
    return Findings(
        headline=headline,
        tables=[Table("rates", title, shown, rows, emphasis=None if rate is None else 0)],
        values={
            "lr": rate,
            "override": None if rate is None else f"lr={rate:g}",
            "effective_batch": test.samples,
            "diverged": test.diverged,
            "rates": rates,
            "losses": test.losses,
            "smoothed": curve.tolist(),
            "facts": facts,
        },
        figures={"lr_find": partial(_figure, config, test, rate)},
        scalars={"lr_find/lr": rate},
    )


def _figure(config: DictConfig, test: RangeTest, rate: float | None) -> Figure:
    """Draw the loss over the learning rate: each update's, smoothed, and what is suggested."""
    smoothed = test.curve()
    figure = Figure(figsize=(7, 4.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(test.rates, test.losses, ".", color="0.7", markersize=4, label="an update")
    axes.plot(test.rates, smoothed, color="tab:blue", linewidth=2, label="smoothed")
    if rate is not None:
        axes.axvline(rate, color="tab:green", label=f"steepest fall: lr={rate:g}")
    axes.axvline(config.lr, color="black", linestyle=":", label=f"config: lr={config.lr:g}")
    before = test.losses[: int(np.argmin(smoothed)) + 1]  # the blow-up at the end is cut off
    low, high = min(*before, *smoothed), max(before)
    room = max(high - low, 1e-6)
    title = f"{config.model.name}, {config.optimizer.name}, effective batch {test.samples}"
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss", title=title)
    axes.set_ylim(low - 0.1 * room, high + 0.3 * room)
    axes.legend()
    return figure
