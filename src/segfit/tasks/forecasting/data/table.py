"""The rows of all series one after the other, in memory or mapped from a file."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from segfit.data.cache import cache_root, cache_sources, digest, label_of
from segfit.data.cache_stores import pack, unpack
from segfit.data.source import Arrays
from segfit.system.files import atomic_write, reporting
from segfit.tasks.forecasting.data.dates import Dates
from segfit.tasks.forecasting.data.files import Layout, Report, SeriesFiles, layout_of

Progress = Callable[[int, int], None]

_HOUR = 3600
_START = 1_577_836_800  # 2020-01-01, seconds since 1970


@dataclass
class Table:
    """All series of a data set."""

    layout: Layout
    names: list[str]
    files: list[Path]  # one a series; empty for those that are made up
    values: Tensor  # (N, columns) float32 on the host
    dates: Dates  # (N,), seconds since 1970
    reports: list[Report]  # one a series

    def __post_init__(self) -> None:
        rows = np.array([[one.rows, one.observed] for one in self.reports], np.int64)
        self.stops = rows[:, 0].cumsum()  # of each series, the row after the last
        self.begins = self.stops - rows[:, 0]  # the first row
        self.ends = self.begins + rows[:, 1]  # the row after the last that was observed


def waves_table(data: DictConfig) -> Table:
    """Return hourly series: a trend, waves of a day and of a week, and noise."""
    hours, columns = np.arange(data.length), data.columns
    rows = np.empty((data.num_series, data.length, columns), np.float32)
    for number in range(data.num_series):
        draw = np.random.default_rng((data.data_seed, number))
        trend = hours[:, None] / data.length * draw.normal(0, 2, columns)
        level = draw.normal(0, 5, columns)
        waves = [
            draw.uniform(0.5, 1.5, columns)
            * np.sin(2 * np.pi * (hours[:, None] / period + draw.random(columns)))
            for period in (24, 168)
        ]
        rows[number] = level + trend + sum(waves) + draw.normal(0, data.noise, rows[number].shape)
    names = [f"wave_{number:03d}" for number in range(data.num_series)]
    values = torch.from_numpy(rows.reshape(-1, columns))
    dates = np.tile(_START + _HOUR * hours, data.num_series)
    return Table(
        layout_of(data), names, [], values, dates, [Report(data.length, data.length)] * len(names)
    )


def csv_table(data: DictConfig, progress: Progress | None = None) -> Table:
    """Return the series of CSV files, read by several processes, or as `data.cache=disk` has kept them.

    Each file that was read is kept by itself: what is interrupted continues, and only files that changed are read again.
    Raises a SegFitError if there is no file, or the first has no dates. What is wrong with single files is in `reports`.
    """
    source = SeriesFiles(data)
    if data.cache == "disk":
        states = [
            (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in source.paths
        ]
        folder = f"{label_of(data)}-{digest(8, repr((source.folder, source.reading)))}"
        kept = cache_root(data).with_name("series") / folder / digest(8, repr(states))
        if not kept.exists():
            _keep(_joined(source, data, progress), kept)
        # Copy on write: torch warns of arrays that cannot be written to.
        arrays = unpack(np.memmap(kept, np.uint8, "c"))
    else:
        arrays = _joined(source, data, progress)
    values, dates, about = arrays
    reports = [Report(**report) for report in json.loads(about.tobytes())]
    return Table(
        source.layout, [*source.names], source.paths, torch.from_numpy(values), dates, reports
    )


def _joined(source: SeriesFiles, data: DictConfig, progress: Progress | None) -> Arrays:
    """Return the values and the dates of all files, one after the other, and their reports as JSON, uint8."""
    cached, _ = cache_sources({"series": (source, "series")}, data, source.reading, progress)
    parts = [cached["series"].read(index) for index in range(len(source))]
    values, dates, reports = zip(*parts, strict=True)
    about = json.dumps([json.loads(report.tobytes()) for report in reports]).encode()
    return np.concatenate(values), np.concatenate(dates), np.frombuffer(about, np.uint8)


def _keep(arrays: Arrays, path: Path) -> None:
    """Write arrays into a file, in place of the others in the folder."""
    unwritable = f"{path.parent}: cannot be written, as data.cache=disk needs; set data.cache_dir or data.cache=none"
    with reporting(unwritable), atomic_write(path, sync=False) as file:
        file.write(pack(arrays).data)
    for old in path.parent.iterdir():  # runs that have mapped its files keep them
        if path.name not in old.name:
            with contextlib.suppress(OSError):
                old.unlink()
