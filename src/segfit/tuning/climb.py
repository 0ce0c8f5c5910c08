"""Measures changes of a training, each on top of those that were kept, and keeps what makes it faster."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig

from segfit.engine.findings import Cell
from segfit.tuning import Bench
from segfit.tuning.change import Change, changed, differing
from segfit.tuning.measure import Speed
from segfit.tuning.trial import run_trial

SPEED_COLUMNS = "ms:.1f | wait %:.1f | GiB:.2f"
KEPT, NOT_FASTER, NO_TIME, OUT_OF_MEMORY = "kept", "not faster", "no time left", "out of memory"


@dataclass
class Step:
    """A change that was tried on top of those that were kept before it."""

    change: Change
    verdict: str  # "kept", or why not
    before: float | None = None  # samples per second without it, if that was measured
    speed: Speed | None = None  # with it, if that was measured to the end
    facts: Mapping[str, str] = field(default_factory=dict)  # of the training that was measured

    @property
    def rate(self) -> float | None:
        """Samples per second."""
        return None if self.speed is None else self.speed.samples_per_second

    def cells(self) -> list[Cell]:
        """Return what `SPEED_COLUMNS` show."""
        if self.speed is None:
            return [None, None, None]
        return [self.speed.ms_median, 100 * self.speed.data_wait, self.speed.peak_gib]


@dataclass
class Climb:
    """Tries changes of a config. Each measurement runs in a process of its own."""

    start_config: DictConfig  # checked, of benchmark.py
    bench: Bench
    seconds: float  # of a measurement
    total: int  # steps that are expected, for the progress
    least_gain: float = 1.0  # a change is kept if it is more than so many times as fast
    patience: float = math.inf  # seconds after which a measurement is killed
    deadline: float = math.inf  # by `time.monotonic`; what still runs then is killed
    steps: list[Step] = field(default_factory=list)  # what was tried, in order
    kept: dict[str, Any] = field(default_factory=dict)  # options, where they differ from the start
    best: float | None = None  # samples per second with them, if any were measured
    longest: float = 0.0  # seconds that a measurement took, its process's start included

    def config(self) -> DictConfig:
        """Return the config with the options that are kept."""
        return changed(self.start_config, self.kept)

    def left(self) -> float:
        """Return the seconds left for trying changes; enough for two longer measurements is put aside."""
        return self.deadline - time.monotonic() - 2 * (self.longest + self.seconds)

    def measure_start(self, change: Change) -> Step:
        """Measure the config as it is, under the name of `change`."""
        step = self._measured(change, {})
        self.steps.append(step)
        if step.speed is not None:
            step.verdict, self.best = KEPT, step.rate
        return step

    def attempt(self, *changes: Change) -> float | None:
        """Measure a change on top of what is kept: of several, the first that fits into memory.

        Return samples per second; None if it cannot be trained, or there is no time for it.
        """
        now = self.config()
        for change in changes:
            if self.best is not None and not differing(now, change.options):
                return self.best
            if self.left() < self.longest:
                step = Step(change, NO_TIME)
                break
            step = self._measured(change, {**self.kept, **change.options})
            if step.verdict != OUT_OF_MEMORY:
                break
        self.steps.append(step)
        return step.rate

    def keep(self, change: Change, rate: float) -> None:
        """Measure all that follows on top of this change."""
        self.kept = differing(self.start_config, {**self.kept, **change.options})
        self.best = rate
        for step in self.steps:
            if step.change == change and step.speed is not None:
                step.verdict = KEPT

    def step(self, *changes: Change) -> bool:
        """`attempt` changes and keep what was measured if it is faster; return whether it was."""
        rate = self.attempt(*changes)
        if rate is None or rate <= self.least_gain * (self.best or 0.0):
            return False
        self.keep(self.steps[-1].change, rate)
        return True

    def compare(self) -> tuple[float | None, float | None]:
        """Measure the start and what was kept once more, for longer, right after each other.

        The fastest of many measurements was also a lucky one, and machines that others use change within minutes.
        Return samples per second of both; None if one does not fit, or time ran out.
        """
        start = self.steps[0]
        if start.speed is None or not self.kept:
            return start.rate, self.best
        for name, options in ((start.change.name, {}), ("result", self.kept)):
            step = self._measured(Change(f"{name}, once more", options), options, last=True)
            if step.speed is not None:
                step.verdict = "to compare"
            self.steps.append(step)
        return self.steps[-2].rate, self.steps[-1].rate

    def _measured(self, change: Change, options: Mapping[str, Any], last: bool = False) -> Step:
        done, start = len(self.steps), time.monotonic()
        self.bench.progress(change.name, done, max(self.total, done + 1))
        left = self.deadline - start if last else min(self.left(), self.patience)
        outcome = run_trial(
            changed(self.start_config, options),
            job="segfit.tuning.measure:measure_training",
            timeout_s=max(left, 1.0),
            seconds=2 * self.seconds if last else self.seconds,
            warmup=self.start_config.benchmark.warmup,
        )
        if not outcome.ok:
            verdict = OUT_OF_MEMORY if outcome.reason == "oom" else outcome.message
            return Step(change, verdict, self.best)
        self.longest = max(self.longest, time.monotonic() - start)
        facts = outcome.values["facts"]
        if change.options.get("compile") and facts["compiled"] == "no":
            notices = [line for line in outcome.values["notices"] if line.startswith("compile=")]
            return Step(change, " ".join(notices).rstrip(".") or "torch.compile failed", self.best)
        return Step(change, NOT_FASTER, self.best, Speed(**outcome.values["speed"]), facts)


def bars(steps: Sequence[Step], labels: Sequence[str], title: str) -> Figure:
    """Draw a bar per step: samples per second, in blue if it was kept, and beside it its label."""
    figure = Figure(figsize=(9, 0.45 * len(steps) + 1.3), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    rates = [step.rate or 0.0 for step in steps]
    colors = ["#3a7ca5" if step.verdict == KEPT else "#c8c8c8" for step in steps]
    drawn = axes.barh(range(len(steps)), rates, color=colors)
    texts = [label if len(label) <= 80 else f"{label[:79]}…" for label in labels]
    axes.bar_label(drawn, texts, padding=3)
    axes.set_yticks(range(len(steps)), [step.change.name for step in steps])
    axes.set_ylim(len(steps) - 0.5, -0.5)
    axes.set_xlim(0, 1.7 * max([*rates, 1e-9]))  # room for the label of the longest bar
    axes.set_xlabel("training samples per second")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure
