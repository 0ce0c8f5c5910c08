"""What a training does to this machine, once a second, and where its time goes.

A `Monitor` reads utilisation, memory, temperature and power of the device: an NVIDIA card's are NVML's, which cover all
processes on it; without NVML they are the processor's, by psutil.

The loop names its phases, and a `Recorder` can time them.

    with phase("forward"):
        outputs = model(inputs)

costs 0.15 microseconds, or a few while a `Recorder` is entered. It reads the host's clock and, on CUDA, records two
events for each phase, which it reads only at the end: the training never waits for the device.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import psutil

from segfit.system.cards import GIB, nvml, visible_gpus
from segfit.system.hardware import core_ids

_recorder: Recorder | None = None
_UNTIMED = contextlib.nullcontext()


@dataclass(frozen=True)
class Sample:
    """One reading; None: not available on this machine."""

    seconds: float  # since the monitor was started
    # percent of the time that the card, or without one this process's cores, were busy since the last reading
    utilisation: float | None
    memory_gib: float | None  # in use on the card, by all processes; without a card, of the machine
    temperature: float | None  # of the card, °C; without one, the processor's hottest sensor
    power_w: float | None  # that the card draws
    cpu: float | None  # with a card, percent of the time that this process's cores were busy


READINGS = tuple(field.name for field in fields(Sample))[1:]


@dataclass(frozen=True)
class Means:
    """Mean and peak of each reading."""

    mean: dict[str, float]
    peak: dict[str, float]


def summed_up(samples: Sequence[Sample]) -> Means:
    """Return mean and peak of each reading that at least one sample has."""
    means = Means({}, {})
    for name in READINGS:
        values = [value for sample in samples if (value := getattr(sample, name)) is not None]
        if values:
            means.mean[name], means.peak[name] = sum(values) / len(values), max(values)
    return means


class Probe:
    """Reads the first visible card, or the processor without NVML."""

    def __init__(self) -> None:
        self.source, self.name = "psutil", "CPU"  # or "NVML" and the card's
        self.total_gib = psutil.virtual_memory().total / GIB
        self._handle: Any = None
        _cpu_percent()  # psutil measures from one call to the next
        with contextlib.suppress(Exception):  # no card, one that fell off the bus, no permission
            card = visible_gpus()[0]
            handle = card.handle()
            self.name = str(nvml().nvmlDeviceGetName(handle))
            self.source, self.total_gib, self._handle = "NVML", card.total_gib, handle

    def read(self, seconds: float) -> Sample:
        """Return a sample of now, `seconds` after the start."""
        cpu = _cpu_percent()
        if self._handle is None:
            used = psutil.virtual_memory()
            memory = (used.total - used.available) / GIB
            # not on Windows and macOS
            sensors: Any = getattr(psutil, "sensors_temperatures", dict)()
            known = [one.current for group in sensors.values() for one in group if one.current]
            return Sample(seconds, cpu, memory, max(known, default=None), None, None)
        library, handle = nvml(), self._handle
        celsius = library.NVML_TEMPERATURE_GPU
        return Sample(
            seconds=seconds,
            utilisation=_asked(lambda: library.nvmlDeviceGetUtilizationRates(handle).gpu),
            memory_gib=_asked(lambda: library.nvmlDeviceGetMemoryInfo(handle).used / GIB),
            temperature=_asked(lambda: library.nvmlDeviceGetTemperature(handle, celsius)),
            power_w=_asked(lambda: library.nvmlDeviceGetPowerUsage(handle) / 1000),  # mW
            cpu=cpu,
        )


class Monitor:
    """Takes a sample each `interval` seconds, in a thread while it is entered, or between `start` and `close`."""

    def __init__(self, interval: float = 1.0) -> None:
        self.interval = interval
        self.probe = Probe()
        self.samples: list[Sample] = []
        self._fresh = 0  # index of the first sample that `fresh` has not returned
        self._start = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="monitor", daemon=True)

    def start(self) -> Monitor:
        """Start the thread; can be called once."""
        self._start = time.monotonic()
        self._thread.start()
        return self

    __enter__ = start

    def close(self) -> None:
        """Stop the thread; takes a sample if there is none. Does nothing if it does not run."""
        if self._thread.is_alive():
            self._over.set()
            self._thread.join()
            self.samples = self.samples or [self.probe.read(time.monotonic() - self._start)]

    def __exit__(self, *_: object) -> None:
        self.close()

    def fresh(self) -> list[Sample]:
        """Return the samples since the last call."""
        samples = self.samples[self._fresh :]
        self._fresh += len(samples)
        return samples

    def _watch(self) -> None:
        due = self.interval
        while not self._over.wait(max(0.0, due - (time.monotonic() - self._start))):
            self.samples.append(self.probe.read(time.monotonic() - self._start))
            due += self.interval


def _asked(question: Callable[[], Any]) -> float | None:
    """Return NVML's answer; None where this card or driver has none."""
    with contextlib.suppress(Exception):  # any of pynvml's errors
        return float(question())
    return None


def _cpu_percent() -> float:
    """Return how busy the cores of this process were since the last call, in percent."""
    by_core = psutil.cpu_percent(percpu=True)
    own = [by_core[core] for core in core_ids() if core < len(by_core)] or by_core
    return float(sum(own) / len(own))


def phase(name: str, *, whole: bool = False) -> contextlib.AbstractContextManager[None]:
    """Return a context that is timed under `name` while a `Recorder` is entered; otherwise it does nothing.

    The time of a phase inside another is not part of the outer one's own time. With `whole`, phases inside are not timed:
    their time is part of this one's.
    """
    return _UNTIMED if _recorder is None else _recorder.time(name, whole)


@dataclass
class Span:
    """One pass through a phase; seconds since the recorder was entered."""

    name: str
    start: float  # on the host's clock
    end: float
    inner: float = 0.0  # seconds in phases inside
    device: float | None = None  # seconds from first to last work on the device; None: a CPU

    @property
    def own(self) -> float:
        """Seconds on the host without the phases inside."""
        return self.end - self.start - self.inner


class Recorder:
    """Records the phases of this process while it is entered; only one at a time. With `cuda`, also the device's time, on the current CUDA stream."""

    def __init__(self, *, cuda: bool = False) -> None:
        self._cuda = cuda
        self._spans: list[Span] = []
        self._events: list[tuple[Any, Any]] = []  # at the start and the end of each span
        self._whole, self._inner = False, 0.0  # of the phase that is open
        self._begun = 0.0

    def __enter__(self) -> Recorder:
        global _recorder  # so that the loop need not pass a recorder through every call
        self._begun = time.perf_counter()
        _recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        global _recorder
        _recorder = None

    def __len__(self) -> int:
        """Return how many passes are over."""
        return len(self._spans)

    def seconds(self) -> float:
        """Return the seconds since the recorder was entered."""
        return time.perf_counter() - self._begun

    @contextlib.contextmanager
    def time(self, name: str, whole: bool) -> Iterator[None]:
        """Return the context that `phase` gives."""
        if self._whole:
            yield
            return
        outer, self._inner, self._whole = self._inner, 0.0, whole
        event = cuda_event if self._cuda else lambda: None
        first, start = event(), self.seconds()
        try:
            yield
        finally:
            end = self.seconds()
            self._events.append((first, event()))
            self._spans.append(Span(name, start, end, self._inner))
            self._inner, self._whole = outer + end - start, False

    def spans(self) -> list[Span]:
        """Return all passes that are over, in the order of their ends; synchronises on CUDA."""
        for span, (first, last) in zip(self._spans, self._events, strict=True):
            if self._cuda:
                last.synchronize()
                span.device = first.elapsed_time(last) / 1000
        return self._spans


def cuda_event() -> Any:
    """Return an event that is recorded in the current CUDA stream, to be timed."""
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
