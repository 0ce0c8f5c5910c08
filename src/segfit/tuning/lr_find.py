"""benchmark=lr_find: the learning-rate range test (Smith, arXiv 1506.01186)."""

from functools import partial

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from segfit.assembly.training import make_training
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.errors import SegFitError
from segfit.tuning.bench import Bench
from segfit.tuning.lr_range import RangeTest, lr_range_test, restored, updates_within
from segfit.tuning.measure import explain_out_of_memory

_NOTHING_SUGGESTED = (
    "The loss never clearly falls in this sweep: its fall is no larger than what it fluctuates from batch to batch. "
    "Raise benchmark.updates, or accumulate for a larger effective batch."
)


def run(config: DictConfig, bench: Bench) -> Findings:
    """Sweep the learning rate and suggest one; the weights that it trained are thrown away."""
    options = config.benchmark
    if options.first >= options.last:
        raise SegFitError(
            f"benchmark.first={options.first:g}: must be below benchmark.last={options.last:g}."
        )
    training = make_training(config, bench.folder, bench.notice)
    updates = options.updates
    with explain_out_of_memory(config), restored(training):
        if config.seconds is not None:
            updates = updates_within(training, config.seconds)
        test = lr_range_test(
            training,
            first=options.first,
            last=options.last,
            updates=updates,
            smoothing=options.smoothing,
            divergence=options.divergence,
            progress=lambda done: bench.progress("the sweep", done, updates),
        )
    return _findings(config, test, dict(training.facts))


def _findings(config: DictConfig, test: RangeTest, facts: dict[str, str]) -> Findings:
    rates, curve, steepest = test.rates, test.curve(), test.steepest()
    minimum = int(np.argmin(curve))
    rows: list[list[Cell]] = [
        ["steepest fall", None, None],
        ["lowest loss", rates[minimum], float(curve[minimum])],
        ["a tenth of that", rates[minimum] / 10, None],
        ["diverged" if test.diverged else "end, not diverged", rates[-1], None],
        ["lr of the config", float(config.lr), None],
    ]
    rate = None
    if steepest is not None:
        rows[0][1:] = rates[steepest], float(curve[steepest])
        rate = float(f"{rates[steepest]:.1e}")  # more would be a precision that the test lacks
    title = f"Sweep of {len(rates)} updates, effective batch {test.samples}"
    columns = [Column("where"), Column("lr", ".2e"), Column("smoothed loss", ".4f")]
    return Findings(
        headline=_headline(config, test, rate),
        tables=[Table("rates", title, columns, rows, emphasis=None if rate is None else 0)],
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
        scalars={} if rate is None else {"lr_find/lr": rate},
    )


def _headline(config: DictConfig, test: RangeTest, rate: float | None) -> str:
    if rate is None:
        return _NOTHING_SUGGESTED
    line = (
        f"lr={rate:g}: there the loss falls fastest. It holds for an effective batch of {test.samples} "
        f"(batch_size={config.batch_size}, accumulate={config.accumulate}), {config.optimizer.name} and this model. "
        f"Type: lr={rate:g}"
    )
    if not test.diverged:
        line += f"\nNothing diverged up to lr={test.rates[-1]:g}: benchmark.last may be raised."
    return line


def _figure(config: DictConfig, test: RangeTest, rate: float | None) -> Figure:
    """Draw the loss over the learning rate: each update's, smoothed, and what is suggested."""
    losses, smoothed = np.array(test.losses), test.curve()
    figure = Figure(figsize=(7, 4.4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(test.rates, losses, ".", color="0.7", markersize=4, label="an update")
    axes.plot(test.rates, smoothed, color="tab:blue", linewidth=2, label="smoothed")
    if rate is not None:
        axes.axvline(rate, color="tab:green", label=f"steepest fall: lr={rate:g}")
    given = f"config: lr={config.lr:g}"
    axes.axvline(config.lr, color="black", linestyle=":", linewidth=1, label=given)
    axes.set_xscale("log")
    before = losses[: int(np.argmin(smoothed)) + 1]  # the blow-up at the end is cut off
    low, high = min(before.min(), smoothed.min()), before.max()
    room = max(high - low, 1e-6)
    axes.set_ylim(low - 0.1 * room, high + 0.3 * room)
    title = f"{config.model.name}, {config.optimizer.name}, effective batch {test.samples}"
    axes.set(xlabel="learning rate", ylabel="training loss", title=title)
    axes.legend()
    return figure
