"""The rows of all series one after the other, in memory or mapped from a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from segfit.data.cache import CacheOptions, cache_sources
from segfit.errors import SegFitError
from segfit.system.files import atomic_write
from segfit.tasks.forecasting.data.files import Dates, Layout, Report, SeriesFiles, layout_of

Progress = Callable[[int, int], None]
Part = tuple[NDArray[np.float32], Dates, Report]

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
    begins: NDArray[np.int64]  # (series,), the first row of each
    reports: list[Report] = field(default_factory=list)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """The row after the last that was observed, of each series."""
        return self.begins + np.array([report.observed for report in self.reports], np.int64)

    @cached_property
    def stops(self) -> NDArray[np.int64]:
        """The row after the last of each series, in which perhaps only what is known in advance is there."""
        return np.append(self.begins[1:], len(self.dates))


def waves_table(data: DictConfig) -> Table:
    """Return hourly series: a trend, waves of a day and of a week, and noise."""
    hours = np.arange(data.length)
    shape = (data.length, data.columns)
    rows = np.empty((data.num_series, *shape), np.float32)
    for number in range(data.num_series):
        draw = np.random.default_rng((data.data_seed, number))
        trend = hours[:, None] / data.length * draw.normal(0, 2, data.columns)
        level = draw.normal(0, 5, data.columns)
        waves = [
            draw.uniform(0.5, 1.5, data.columns)
            * np.sin(2 * np.pi * (hours[:, None] / period + draw.random(data.columns)))
            for period in (24, 168)
        ]
        rows[number] = level + trend + sum(waves) + draw.normal(0, data.noise, shape)
    names = [f"wave_{number:03d}" for number in range(data.num_series)]
    return Table(
        layout_of(data),
        names,
        [],
        torch.from_numpy(rows.reshape(-1, data.columns)),
        np.tile(_START + _HOUR * hours, data.num_series),
        np.arange(data.num_series) * data.length,
        [Report(data.length) for _ in names],
    )


def csv_table(data: DictConfig, progress: Progress | None = None) -> Table:
    """Return the series of CSV files, read by several processes, or as `data.cache=disk` has kept them.

    Each file that was read is kept by itself: what is interrupted continues, and only files that changed are read again.
    Raises a SegFitError if there is no file, or the first has no dates. What is wrong with single files is in `reports`.
    """
    source = SeriesFiles(data)
    options = CacheOptions(
        where="disk" if data.cache == "disk" else "ram",
        reading=source.reading,
        label=Path(data.root).expanduser().resolve().name,
        folder=Path(data.cache_dir) if data.cache_dir else None,
    )

    def decoded() -> Iterator[Part]:
        cached, _ = cache_sources({"series": (source, "series")}, options, progress)
        for index in range(len(source)):
            values, dates, report = cached["series"].read(index)
            yield values, dates, Report(**json.loads(report.tobytes()))

    width = len(source.layout.columns)
    if data.cache != "disk":
        parts = list(decoded())
        values, dates = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
        lengths, reports = [len(part[1]) for part in parts], [part[2] for part in parts]
    else:
        states = [(file, file.stat()) for file in source.paths]
        state = _digest([(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in states])
        kind = _digest((source.folder, source.reading))
        kept = options.root.with_name("series") / f"{options.label}-{kind}" / state
        if not kept.with_suffix(".json").exists():
            _keep(decoded(), kept)
        meta = json.loads(kept.with_suffix(".json").read_text(encoding="utf-8"))
        lengths, reports = meta["lengths"], [Report(**report) for report in meta["reports"]]
        values, dates = np.empty((0, width), np.float32), np.empty(0, np.int64)
        if sum(lengths):  # an empty file cannot be mapped
            # Copy on write: torch warns of arrays that cannot be written to.
            values = np.memmap(kept.with_suffix(".f32"), np.float32, "c").reshape(-1, width)
            dates = np.memmap(kept.with_suffix(".i64"), np.int64, "c")
    names = [source.id(index) for index in range(len(source))]
    begins = np.cumsum([0, *lengths[:-1]])
    return Table(
        source.layout, names, source.paths, torch.from_numpy(values), dates, begins, reports
    )


def _keep(series: Iterator[Part], path: Path) -> None:
    """Write all series into files of this name, in place of the others in the folder."""
    lengths, reports = [], []
    try:
        with (
            atomic_write(path.with_suffix(".f32"), sync=False) as values,
            atomic_write(path.with_suffix(".i64"), sync=False) as dates,
        ):
            for rows, days, report in series:
                values.write(np.ascontiguousarray(rows).data)
                dates.write(np.ascontiguousarray(days).data)
                lengths.append(len(days))
                reports.append(vars(report))
        with atomic_write(path.with_suffix(".json"), sync=False) as meta:  # last: all is there
            meta.write(json.dumps({"lengths": lengths, "reports": reports}).encode())
        for old in path.parent.iterdir():  # runs that have mapped its files keep them
            if path.name not in old.name:
                with contextlib.suppress(OSError):
                    old.unlink()
    except OSError as error:
        raise SegFitError(
            f"{path.parent}: cannot be written ({error.strerror}), as data.cache=disk needs. Set data.cache_dir to a "
            f"folder of your own, or data.cache=none."
        ) from error


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=8).hexdigest()
