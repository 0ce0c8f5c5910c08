"""Utilisation, memory, temperature and power of the device, once a second.

The readings of an NVIDIA card are NVML's, which cover all processes on it. Without NVML they are the processor's, by
psutil.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import psutil

from segfit.system.cards import GIB, nvml, visible_gpus
from segfit.system.hardware import core_ids


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
            return Sample(seconds, cpu, memory, _cpu_temperature(), None, None)
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

    def start(self) -> None:
        """Start the thread; can be called once."""
        self._start = time.monotonic()
        self._thread.start()

    def close(self) -> None:
        """Stop the thread. Does nothing if it does not run."""
        if self._thread.is_alive():
            self._over.set()
            self._thread.join()

    def __enter__(self) -> Monitor:
        self.start()
        return self

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


def _cpu_temperature() -> float | None:
    # not on Windows and macOS
    sensors: dict[str, Any] = getattr(psutil, "sensors_temperatures", dict)()
    readings = [entry.current for group in sensors.values() for entry in group if entry.current]
    return max(readings, default=None)
