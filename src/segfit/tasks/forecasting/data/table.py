"""The rows of all series one after the other, in memory or mapped from a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
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
from segfit.tasks.forecasting.data.files import (
    Dates,
    Layout,
    Report,
    SeriesFiles,
    files_of,
    layout_of,
    waves_layout,
)

Progress = Callable[[int, int], None]

_HOUR = 3600
_START = 1_577_836_800  # 2020-01-01, seconds since 1970
_META, _VALUES, _DATES = "series.json", "values.f32", "dates.i64"


@dataclass
class Table:
    """All series of a data set.

    Args:
        layout: of the columns.
        names: one a series.
        files: one a series; empty for those that are made up.
        values: (N, columns) float32 on the host.
        dates: (N,) int64, seconds since 1970.
        begins: (series,) int64, the first row of each.
        reports: what else there is to say about each.
    """

    layout: Layout
    names: list[str]
    files: list[Path]
    values: Tensor
    dates: Dates
    begins: NDArray[np.int64]
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
        waves_layout(data),
        names,
        [],
        torch.from_numpy(rows.reshape(-1, data.columns)),
        np.tile(_START + _HOUR * hours, data.num_series),
        np.arange(data.num_series) * data.length,
        [Report(data.length) for _ in names],
    )


def csv_table(data: DictConfig, progress: Progress | None = None) -> Table:
    """Return the series of CSV files, read by several processes, or as `data.cache=disk` has kept them.

    Each file that was read is kept by itself: what is interrupted goes on, and only files that changed are read again.

    Raises:
        SegFitError: if there is no file, or the first has no dates. What is wrong with single files is in `reports`.
    """
    files = files_of(data.root)
    layout = layout_of(data, files[0])
    source = SeriesFiles(data.root, files, layout, data)
    label = re.sub(r"[^\w.-]", "_", Path(data.root).expanduser().resolve().name)[:64]
    options = CacheOptions(
        where="disk" if data.cache == "disk" else "ram",
        reading=source.reading,
        label=label,
        folder=Path(data.cache_dir) if data.cache_dir else None,
    )
    folder = (
        options.root.with_name("series") / f"{label}-{_digest(str(source.folder), options.reading)}"
    )
    kept = folder / _digest(*_states(files))
    names = [source.id(index) for index in range(len(files))]

    def decoded() -> Iterator[tuple[NDArray[np.float32], Dates, Report]]:
        cached, _ = cache_sources({"series": (source, "series")}, options, progress)
        for index in range(len(files)):
            values, dates, report = cached["series"].read(index)
            yield values, dates, Report.unpacked(report)

    if data.cache != "disk":
        parts = list(decoded())
        values, dates = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
        lengths, reports = [len(part[1]) for part in parts], [part[2] for part in parts]
    else:
        if not (kept / _META).exists():
            _keep(decoded(), kept)
        meta = json.loads((kept / _META).read_text(encoding="utf-8"))
        lengths, reports = meta["lengths"], [Report(**report) for report in meta["reports"]]
        values, dates = np.empty((0, len(layout.columns)), np.float32), np.empty(0, np.int64)
        if sum(lengths):  # an empty file cannot be mapped
            # Copy on write: torch warns of arrays that cannot be written to.
            values = np.memmap(kept / _VALUES, np.float32, "c").reshape(-1, len(layout.columns))
            dates = np.memmap(kept / _DATES, np.int64, "c")
    begins = np.cumsum([0, *lengths[:-1]])
    return Table(layout, names, files, torch.from_numpy(values), dates, begins, reports)


def _keep(series: Iterator[tuple[NDArray[np.float32], Dates, Report]], folder: Path) -> None:
    """Write all series into a new folder, in place of those that stand beside it."""
    lengths, reports = [], []
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as name:
            partial = Path(name) / "new"
            partial.mkdir()
            with (partial / _VALUES).open("wb") as values, (partial / _DATES).open("wb") as dates:
                for rows, days, report in series:
                    values.write(np.ascontiguousarray(rows).data)
                    dates.write(np.ascontiguousarray(days).data)
                    lengths.append(len(days))
                    reports.append(vars(report))
            text = json.dumps({"lengths": lengths, "reports": reports})
            (partial / _META).write_text(text, encoding="utf-8")
            for old in folder.parent.iterdir():  # runs that have mapped its files keep them
                if old.name != partial.parent.name:
                    shutil.rmtree(old, ignore_errors=True)
            with contextlib.suppress(FileExistsError):
                partial.rename(folder)
    except OSError as error:
        raise SegFitError(
            f"{folder}: cannot be written ({error.strerror}), as data.cache=disk needs. Set data.cache_dir to a folder "
            f"of your own, or data.cache=none."
        ) from error


def _states(files: Sequence[Path]) -> Iterator[str]:
    """Yield what changes when a file does."""
    for file in files:
        stat = file.stat()
        yield f"{os.fsencode(file)!r}\0{stat.st_size}\0{stat.st_mtime_ns}"


def _digest(*parts: str) -> str:
    text = "\0".join(parts).encode(errors="surrogateescape")
    return hashlib.blake2b(text, digest_size=8).hexdigest()
