"""benchmark=monitor: what the device does while something else, a training most of all, runs on this machine."""

import csv
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from omegaconf import DictConfig

from segfit.engine.findings import Column, Findings, Table
from segfit.system.monitor import READINGS, Means, Monitor, Probe, Sample, summed_up
from segfit.tuning.bench import Bench

SECONDS = 60.0
_SHOW_EVERY = 30  # samples between two lines on an output that is no terminal
_LABELS = {
    "utilisation": "utilisation, %",
    "memory_gib": "memory, GiB",
    "temperature": "temperature, °C",
    "power_w": "power, W",
    "cpu": "CPU, %",
}
_BUSY, _IDLE = 90.0, 5.0  # percent of utilisation
_HOT = 85.0  # °C; cards slow down from about here on
_ROOMY = 0.6  # share of the memory at its peak


def run(config: DictConfig, bench: Bench) -> Findings:
    """Watch for `seconds` (60), once a second; Ctrl-C ends the watch early and still sums up."""
    seconds = config.seconds or SECONDS
    with Probe() as probe:
        if probe.source != "NVML":
            bench.notice(
                "NVIDIA's management library does not answer: watching the processor by psutil, which knows no power "
                "and perhaps no temperature."
            )
    return watch(Monitor(), seconds, bench)


def watch(monitor: Monitor, seconds: float, bench: Bench) -> Findings:
    """Let the monitor run so long, with a live line, and return what it saw."""
    every = 1 if sys.stdout.isatty() else _SHOW_EVERY
    due = max(1, round(seconds / monitor.interval))
    shown = -1
    with monitor:
        # the last sample is due at its very end
        end = time.monotonic() + seconds + monitor.interval / 2
        try:
            while time.monotonic() < end:
                samples = monitor.samples[:]
                if samples and len(samples) // every > shown:
                    shown = len(samples) // every
                    bench.progress(live_line(samples[-1], monitor.probe), len(samples), due)
                time.sleep(monitor.interval / 5)
        except KeyboardInterrupt:
            bench.notice("stopped by Ctrl-C: this is what was seen until then.")
        samples = monitor.samples
    return found(samples, monitor.probe, bench.folder)


def live_line(sample: Sample, probe: Probe) -> str:
    """Return a reading as one line: "NVIDIA H200: 97 %, 61.2 of 139.7 GiB, 61 °C, 480 W, CPU 45 %"."""
    texts = {
        "utilisation": "{:.0f} %",
        "memory_gib": f"{{:.1f}} of {probe.total_gib:.1f} GiB",
        "temperature": "{:.0f} °C",
        "power_w": "{:.0f} W",
        "cpu": "CPU {:.0f} %",
    }
    known = {name: getattr(sample, name) for name in texts}
    parts = [texts[name].format(value) for name, value in known.items() if value is not None]
    return f"{probe.name}: {', '.join(parts)}"


def found(samples: Sequence[Sample], probe: Probe, folder: Path) -> Findings:
    """Write the samples to samples.csv in the folder, and sum them up."""
    with (folder / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Sample)])
        writer.writeheader()
        writer.writerows(asdict(sample) for sample in samples)
    means = summed_up(samples)
    rows = [(_LABELS[name], means.mean[name], means.peak[name]) for name in means.mean]
    columns = (Column("reading"), Column("mean", ".1f"), Column("peak", ".1f"))
    title = f"{probe.name}, {len(samples)} samples by {probe.source}"
    return Findings(
        headline=judgement(means, probe.total_gib, card=probe.source == "NVML"),
        tables=[Table("summary", title, columns, rows)],
        values={
            "source": probe.source,
            "device": probe.name,
            "memory_total_gib": probe.total_gib,
            **asdict(means),
            "samples": [asdict(sample) for sample in samples],
        },
        figures={"samples": partial(_figure, samples, means)},
        scalars={f"mean/{name}": value for name, value in means.mean.items()}
        | {f"peak/{name}": value for name, value in means.peak.items()},
    )


def judgement(means: Means, total_gib: float, *, card: bool) -> str:
    """Return the means of a watched `card`, or else of the processor, in a sentence or two."""
    if not means.mean:
        return "Nothing was seen: seconds is shorter than the time between two samples."
    what = "The card" if card else "The processor"
    percent = means.mean.get("utilisation")
    if percent is None:
        says = "does not report its utilisation."
    elif percent >= _BUSY:
        says = f"was busy {percent:.0f} % of the time: there is little left to gain by feeding it faster."
    elif percent <= _IDLE:
        says = f"was idle ({percent:.0f} %): nothing ran on it."
    else:
        says = f"was busy {percent:.0f} % of the time: it waits. benchmark=diagnose names what for."
    sentences = [f"{what} {says}"]
    memory = means.peak.get("memory_gib")
    if card and memory is not None and memory < _ROOMY * total_gib:
        sentences.append(
            f"At most {memory:.1f} of {total_gib:.1f} GiB were in use: a larger batch may fit, ask benchmark=max_batch."
        )
    temperature = means.peak.get("temperature")
    if temperature is not None and temperature >= _HOT:
        sentences.append(f"It reached {temperature:.0f} °C, at which it may slow itself down.")
    return " ".join(sentences)


def _figure(samples: Sequence[Sample], means: Means) -> Figure:
    names = [name for name in READINGS if name in means.mean]
    figure = Figure(figsize=(8, 1 + 1.5 * max(len(names), 1)), dpi=100, layout="constrained")
    if not names:
        return figure
    seconds = [sample.seconds for sample in samples]
    columns = figure.subplots(len(names), sharex=True, squeeze=False)
    for axes, name in zip(columns[:, 0], names, strict=True):
        values = np.array([getattr(sample, name) for sample in samples], dtype=float)  # None: nan
        axes.plot(seconds, values, linewidth=1.2)
        axes.axhline(means.mean[name], color="#888888", linewidth=0.8, linestyle="--")
        axes.set_ylabel(_LABELS[name].replace(", ", "\n"))
        axes.set_ylim(0, 105 if name in ("utilisation", "cpu") else 1.1 * means.peak[name])
        axes.grid(color="#eeeeee")
    axes.set_xlabel("seconds (dashed: mean)")
    return figure
