"""Records where the time of a real training goes: the loop as train.py runs it, ended after some seconds."""

from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from segfit.engine.events import EpochLog, Listener, Listeners
from segfit.engine.fit import Fit
from segfit.errors import SegFitError
from segfit.system.phases import Recorder, Span

LEAST_UPDATES = 3  # however slow they are
OUTSIDE = ("validation", "checkpoint")  # phases that are no part of an update


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
        shares["host"] = max(1.0 - sum(shares.values()), 0.0)
        return shares


def record(
    fit: Fit, listener: Listener, *, batch_size: int, seconds: float, warmup: int
) -> Timeline:
    """Train what train.py builds and return where the time went: `seconds` of it, after `warmup` updates.

    A micro-batch has `batch_size` samples; the listener is closed afterwards.

    Raises:
        KeyboardInterrupt: if the user stopped it.
        SegFitError: if it ended by itself before anything was recorded.
    """
    recording = _Recording(fit, seconds, warmup)
    with recording.context:
        try:
            end = fit.run(Listeners(listener, recording), {})
        finally:
            listener.close()
    if end.reason in ("interrupted", "terminated"):
        raise KeyboardInterrupt
    return recording.timeline(batch_size)


class _Recording(Listener):
    """A listener that starts and ends the recording at ends of updates, and then ends the training."""

    def __init__(self, fit: Fit, seconds: float, warmup: int) -> None:
        self.fit = fit
        self.length, self.warmup = seconds, warmup
        self.recorder = Recorder(cuda=fit.state.device.type == "cuda")
        self.context = ExitStack()
        self.made = 0  # updates of this training
        self.begun: int | None = None  # how many of them before the recording
        self.seconds, self.spans = 0.0, 0  # of the recording, at the end of the last update
        self.epochs: list[float] = []  # when they began

    def step(self, _epoch: int, _update: int) -> None:
        self.made += 1
        if self.begun is None:
            if self.made > self.warmup:
                self.begun = self.made
                self.context.enter_context(self.recorder)
            return
        self.seconds, self.spans = self.recorder.seconds(), len(self.recorder)
        if self.seconds >= self.length and self.made - self.begun >= LEAST_UPDATES:
            self.context.close()
            self.fit.stop.reason = "measured"

    def epoch(self, _log: EpochLog) -> None:
        if self.begun is not None:
            self.epochs.append(self.recorder.seconds())

    def timeline(self, batch_size: int) -> Timeline:
        updates = self.made - self.begun if self.begun is not None else 0
        if updates < 1 or not self.spans:
            raise SegFitError(
                f"the training ended after {self.made} updates, before anything was recorded: raise epochs, or set "
                f"benchmark.warmup lower."
            )
        spans = self.recorder.spans()[: self.spans]
        phases: dict[str, float] = defaultdict(float)
        device: dict[str, float] = defaultdict(float)
        for span in spans:
            phases[span.name] += span.own
            if span.device_start is not None and span.device_end is not None:
                device[span.name] += span.device_end - span.device_start
        micro_batches = sum(span.name == "copy" for span in spans)
        return Timeline(
            updates=updates,
            samples=micro_batches * batch_size / updates,
            seconds=self.seconds,
            phases=dict(phases),
            device=dict(device),
            restarts=_restarts(spans, self.epochs),
            epochs=sum(begin < self.seconds for begin in self.epochs),
        )


def _restarts(spans: list[Span], epochs: list[float]) -> float:
    """Return the seconds by which data at the turns of epochs kept the loop waiting longer than other data.

    An epoch's first batch waits for the workers to start; asking for one more than there are, for them to end.
    """
    copies = [span.start for span in spans if span.name == "copy"]
    waits = [span for span in spans if span.name == "data"]
    last = [wait for wait in waits if not any(wait.start <= at <= wait.end for at in copies)]
    batches = [wait for wait in waits if wait not in last]
    first = [next((wait for wait in batches if wait.start >= begin), None) for begin in epochs]
    others = [wait.end - wait.start for wait in batches if wait not in first]
    usual = median(others) if others else 0.0
    starts = sum(max(wait.end - wait.start - usual, 0.0) for wait in first if wait is not None)
    return starts + sum(wait.end - wait.start for wait in last)
