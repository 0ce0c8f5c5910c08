"""benchmark=monitor: what the device does while something else, a training most of all, runs on this machine."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from omegaconf import DictConfig

from segfit.engine.findings import Findings, Table, columns
from segfit.system.monitor import READINGS, Means, Probe, Sample, summed_up
from segfit.tuning import Bench

SECONDS = 60.0
_SHOW_EVERY = 30  # samples between two lines on an output that is no terminal
# Reading → its label, and how a line says it.
_TEXTS = {
    "utilisation": ("utilisation, %", "{:.0f} %"),
    "memory_gib": ("memory, GiB", "{:.1f} of {total:.1f} GiB"),
    "temperature": ("temperature, °C", "{:.0f} °C"),
    "power_w": ("power, W", "{:.0f} W"),
    "cpu": ("CPU, %", "CPU {:.0f} %"),
}
_BUSY, _IDLE = 90.0, 5.0  # percent of utilisation
_HOT = 85.0  # °C; cards slow down from about here on
_ROOMY = 0.6  # share of the memory at its peak


def run(config: DictConfig, bench: Bench) -> Findings:
    """Watch for `seconds` (60), once a second; Ctrl-C ends the watch early and still sums up."""
    probe = Probe()
    if probe.source != "NVML":
        bench.notice(
            "NVIDIA's management library does not answer: watching the processor by psutil, which knows no power "
            "and perhaps no temperature."
        )
    return watch(probe, config.seconds or SECONDS, bench)


def watch(probe: Probe, seconds: float, bench: Bench, interval: float = 1.0) -> Findings:
    """Read a probe each `interval` so long, with a live line, and return what it saw."""
    every = 1 if sys.stdout.isatty() else _SHOW_EVERY
    due, start = round(seconds / interval), time.monotonic()
    samples: list[Sample] = []
    try:
        while len(samples) < due:
            begins = start + interval * (len(samples) + 1)
            time.sleep(max(begins - time.monotonic(), 0.0))
            samples.append(probe.read(time.monotonic() - start))
            if len(samples) == 1 or len(samples) % every == 0:
                bench.progress(live_line(samples[-1], probe), len(samples), due)
    except KeyboardInterrupt:
        bench.notice("stopped by Ctrl-C: this is what was seen until then.")
    return found(samples, probe, bench.folder)


def live_line(sample: Sample, probe: Probe) -> str:
    """Return a reading as one line: "NVIDIA H200: 97 %, 61.2 of 139.7 GiB, 61 °C, 480 W, CPU 45 %"."""
    known = {name: value for name in _TEXTS if (value := getattr(sample, name)) is not None}
    parts = [_TEXTS[name][1].format(one, total=probe.total_gib) for name, one in known.items()]
    return f"{probe.name}: {', '.join(parts)}"


def found(samples: Sequence[Sample], probe: Probe, folder: Path) -> Findings:
    """Write the samples to samples.csv in the folder, and sum them up."""
    taken = [asdict(sample) for sample in samples]
    table = pd.DataFrame(taken, columns=["seconds", *READINGS])
    table.to_csv(folder / "samples.csv", index=False)
    means = summed_up(samples)
    mean, peak = means.mean, means.peak
    rows = [(_TEXTS[name][0], mean[name], peak[name]) for name in mean]
    shown = columns("reading | mean:.1f | peak:.1f")
    title = f"{probe.name}, {len(samples)} samples by {probe.source}"
    return Findings(
        headline=judgement(means, probe.total_gib, card=probe.source == "NVML"),
        tables=[Table("summary", title, shown, rows)],
        values={
            "source": probe.source,
            "device": probe.name,
            "memory_total_gib": probe.total_gib,
            "mean": mean,
            "peak": peak,
            "samples": taken,
        },
        figures={"samples": partial(_figure, table, means)},
        scalars={f"mean/{name}": value for name, value in mean.items()}
        | {f"peak/{name}": value for name, value in peak.items()},
    )


def judgement(means: Means, total_gib: float, *, card: bool) -> str:
    """Return the means of a watched `card`, or else of the processor, in a sentence or two."""
    if not means.mean:
        return "Nothing was seen: seconds is shorter than the time between two samples."
    percent = means.mean.get("utilisation")
    if percent is None:
        says = "does not report its utilisation."
    elif percent >= _BUSY:
        says = f"was busy {percent:.0f} % of the time: there is little left to gain by feeding it faster."
    elif percent <= _IDLE:
        says = f"was idle ({percent:.0f} %): nothing ran on it."
    else:
        says = f"was busy {percent:.0f} % of the time: it waits. benchmark=diagnose names what for."
    says = f"The {'card' if card else 'processor'} {says}"
    memory = means.peak.get("memory_gib", total_gib)
    if card and memory < _ROOMY * total_gib:
        says += f" At most {memory:.1f} of {total_gib:.1f} GiB were in use: a larger batch may fit, ask benchmark=max_batch."
    temperature = means.peak.get("temperature", 0.0)
    if temperature >= _HOT:
        says += f" It reached {temperature:.0f} °C, at which it may slow itself down."
    return says


def _figure(table: pd.DataFrame, means: Means) -> Figure:
    figure = Figure(figsize=(8, 1 + 1.5 * max(len(means.mean), 1)), dpi=100, layout="constrained")
    for place, (name, mean) in enumerate(means.mean.items(), start=1):
        axes = figure.add_subplot(len(means.mean), 1, place)
        axes.plot(table["seconds"], table[name], linewidth=1.2)
        axes.axhline(mean, color="#888888", linewidth=0.8, linestyle="--")
        axes.set_ylim(0, 105 if name in ("utilisation", "cpu") else 1.1 * means.peak[name])
        label = _TEXTS[name][0].replace(", ", "\n")
        axes.set(ylabel=label, xlabel="seconds (dashed: mean)")
        axes.grid(color="#eeeeee")
        axes.label_outer()
    return figure
