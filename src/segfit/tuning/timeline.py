"""Records a real training: where its time goes, and what a sample costs the process that makes it."""

import copy
import random
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from omegaconf import DictConfig

from segfit.assembly.task import planning_of, sample_bytes
from segfit.assembly.training import make_training
from segfit.data.source import Arrays, Source, SourceView
from segfit.engine.events import EpochLog, Listener, Listeners
from segfit.engine.fit import Fit
from segfit.errors import SegFitError
from segfit.report.lines import LineReport
from segfit.report.loggers import run_listener
from segfit.runs.files import RunFolder
from segfit.system.hardware import available_cores
from segfit.system.monitor import Means, Monitor, Recorder, Span, summed_up
from segfit.tuning import Bench
from segfit.tuning.change import changed
from segfit.tuning.verdict import Costs, Facts

LEAST_UPDATES = 3  # however slow they are
OUTSIDE = ("validation", "checkpoint")  # phases that are no part of an update
SAMPLES = 32
_SECONDS = 3.0  # at most, however slow a sample is; one is measured in any case
_ENDLESS = 1_000_000  # epochs
_RAM_SHARE = 0.5  # of the free memory that decoded images may take


@dataclass(frozen=True)
class Timeline:
    """What was recorded, from the end of one update to the end of another."""

    updates: int  # made in that time
    samples: float  # of an update, on average
    seconds: float  # all of it, wall-clock
    phases: dict[str, float]  # seconds on the host's clock; a copy is no part of the wait for data
    device: dict[str, float]  # on the device's, from a phase's first work to its last; CPU: empty
    restarts: float  # seconds that turns of epochs kept the loop waiting beside what batches take
    epochs: int  # that began in that time

    @property
    def update(self) -> float:
        """Seconds an update, without validation and checkpoints."""
        outside = sum(self.phases.get(name, 0.0) for name in OUTSIDE)
        return (self.seconds - outside) / self.updates

    @property
    def rate(self) -> float:
        """Samples per second, without validation and checkpoints."""
        return self.samples / self.update

    def by_phase(self) -> dict[str, float]:
        """Return name → share (0-1) of the whole time; "host" is what no phase names."""
        shares = {name: value / self.seconds for name, value in self.phases.items()}
        return {**shares, "host": max(1.0 - sum(shares.values()), 0.0)}


def recorded(
    config: DictConfig, bench: Bench, folder: Path, seconds: float
) -> tuple[Facts, Timeline, Means, int]:
    """Train as train.py does, TensorBoard and checkpoints in `folder` included, for some seconds.

    Nothing of the training is kept: what is tried next needs the memory. Return the facts, except for `resident`,
    `launching` and `tried`; where the time went; the monitor's means; samples of the data set.
    """
    endless = {"epochs": _ENDLESS, "max_steps": None, "patience": None, "resume": None}
    training = make_training(changed(config, endless), folder, bench.notice)
    loader = training.fit.train.batches.loader  # type: ignore[attr-defined]
    dataset = loader.samples
    if config.benchmark.slow_disk_ms and config.data.cache == "none":
        dataset.source = SlowSource(dataset.source, config.benchmark.slow_disk_ms / 1000)
    costs, copied = measure_costs(dataset)
    silent = LineReport(lambda _: None)
    listener = run_listener(RunFolder(folder), silent, config, training.hparams)
    batch, warmup = config.batch_size, config.benchmark.warmup
    with Monitor(min(1.0, seconds / 10)) as monitor:
        timeline = record(training.fit, listener, batch_size=batch, seconds=seconds, warmup=warmup)
    restart = timeline.restarts / timeline.updates if loader.num_workers else 0.0
    fitted = config.data.get("fit") != "crop"  # the cache holds samples of that size already
    cached = Costs(decode=copied, fit=0.0 if fitted else costs.fit, augment=costs.augment)
    decoded = sample_bytes(config) * len(dataset)
    facts = Facts(
        cuda=training.fit.state.device.type == "cuda",
        samples=round(timeline.samples),
        update=timeline.update,
        phases={name: value / timeline.updates for name, value in timeline.phases.items()},
        costs=costs,
        workers=loader.num_workers,
        cores=available_cores(),
        threads=torch.get_num_threads(),
        restart=restart,
        refill=min(restart, timeline.epochs * batch * costs.total / timeline.updates),
        cached=cached if config.data.cache == "none" else None,
        **{key: config.loader[key] for key in ("pin_memory", "non_blocking", "persistent")},
        log_every=config.report.log_every,
        idle=list(planning_of(config).feeding(config).idle),
        cache="ram" if decoded < _RAM_SHARE * psutil.virtual_memory().available else "disk",
    )
    return facts, timeline, summed_up(monitor.samples), len(dataset)


class _Marks(Listener):
    """Notes the ends of updates and the begins of epochs, and ends the training once enough is recorded."""

    def __init__(self, fit: Fit, seconds: float, warmup: int) -> None:
        self.fit, self.length, self.warmup = fit, seconds, warmup
        self.recorder = Recorder(cuda=fit.state.device.type == "cuda")
        self.updates: list[tuple[float, int]] = []  # the recorder's seconds then, and its spans
        self.epochs: list[float] = []  # the recorder's seconds then

    def step(self, _epoch: int, _update: int) -> None:
        self.updates.append((self.recorder.seconds(), len(self.recorder)))
        enough = len(self.updates) > self.warmup + LEAST_UPDATES
        if enough and self.updates[-1][0] - self.updates[self.warmup][0] >= self.length:
            self.fit.stop.reason = "measured"

    def epoch(self, _log: EpochLog) -> None:
        self.epochs.append(self.recorder.seconds())


def record(
    fit: Fit, listener: Listener, *, batch_size: int, seconds: float, warmup: int
) -> Timeline:
    """Train what train.py builds and return where the time went: `seconds` of it, after `warmup` updates.

    A micro-batch has `batch_size` samples; the listener is closed afterwards. Raise a KeyboardInterrupt if the user
    stopped it, a SegFitError if it ended by itself before anything was recorded.
    """
    marks = _Marks(fit, seconds, warmup)
    try:
        with marks.recorder:
            end = fit.run(Listeners(listener, marks), {})
    finally:
        listener.close()
    if end.reason in ("interrupted", "terminated"):
        raise KeyboardInterrupt
    updates = len(marks.updates) - 1 - warmup
    if updates < 1:
        raise SegFitError(
            f"the training ended after {len(marks.updates)} updates, before anything was recorded: raise epochs, or set "
            f"benchmark.warmup lower."
        )
    (begin, before), (over, after) = marks.updates[warmup], marks.updates[-1]
    spans = marks.recorder.spans()[before:after]
    epochs = [start for start in marks.epochs if begin <= start < over]
    phases: dict[str, float] = defaultdict(float)
    device: dict[str, float] = defaultdict(float)
    for span in spans:
        phases[span.name] += span.own
        if span.device is not None:
            device[span.name] += span.device
    return Timeline(
        updates=updates,
        samples=sum(span.name == "copy" for span in spans) * batch_size / updates,
        seconds=over - begin,
        phases=dict(phases),
        device=dict(device),
        restarts=_restarts(spans, epochs),
        epochs=len(epochs),
    )


def _restarts(spans: list[Span], epochs: list[float]) -> float:
    """Return the seconds by which data at the turns of epochs kept the loop waiting longer than other data.

    An epoch's first batch waits for the workers to start; asking for one more than there are, for them to end.
    """
    waits = [span for span in spans if span.name == "data"]
    batches = [wait for wait in waits if wait.inner]  # in the others none came that was copied
    first = [next((wait for wait in batches if wait.start >= begin), None) for begin in epochs]
    others = [wait.end - wait.start for wait in batches if wait not in first]
    usual = median(others) if others else 0.0
    starts = sum(max(wait.end - wait.start - usual, 0.0) for wait in first if wait is not None)
    return starts + sum(wait.end - wait.start for wait in waits if not wait.inner)


class SlowSource(SourceView):
    """A source that waits some seconds before every read, as a slow disk would."""

    def __init__(self, source: Source, seconds: float) -> None:
        super().__init__(source)
        self.seconds = seconds

    def read(self, index: int) -> Arrays:
        """Wait and read."""
        time.sleep(self.seconds)
        return self.source.read(index)


def measure_costs(dataset: Any) -> tuple[Costs, float]:
    """Return the mean costs of samples that are drawn at random, and the seconds that a plain copy of one takes.

    One thread works, as in a data worker. Waiting is what passes by the clock but not by the processor's; all else is
    counted by the processor's, so that other processes do not count.
    """
    chosen = random.Random(0).sample(range(len(dataset)), min(SAMPLES, len(dataset)))
    plain = copy.copy(dataset)
    plain.augment = None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        dataset[chosen[0], 0]  # imports and tables come with the first one
        measured = []
        begun = time.perf_counter()
        for seed, index in enumerate(chosen):
            wall, cpu, _ = _timed(dataset.source.read, index)
            _, again, _ = _timed(dataset.source.read, index)  # as the next one finds the file
            _, without, sample = _timed(plain.__getitem__, (index, seed))
            _, augmented, _ = _timed(dataset.__getitem__, (index, seed))
            _, copied, _ = _timed(copy.deepcopy, sample)
            augment = augmented - without if getattr(dataset, "augment", None) is not None else 0.0
            parts = (wall - cpu, min(cpu, wall), without - again, augment, copied)
            measured.append([max(part, 0.0) for part in parts])
            if time.perf_counter() - begun > _SECONDS:
                break
        *costs, copied = np.mean(measured, axis=0).tolist()
        return Costs(*costs), copied
    finally:
        torch.set_num_threads(threads)


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """Return (seconds by the clock, seconds of this thread on the processor, what `work` returned)."""
    wall, cpu = time.perf_counter(), time.thread_time()
    result = work(*arguments)
    return time.perf_counter() - wall, time.thread_time() - cpu, result
