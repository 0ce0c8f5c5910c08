"""Series cut by time and standardised by their training part, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from segfit.data.files import some
from segfit.errors import SegFitError
from segfit.system.hardware import fits
from segfit.tasks.forecasting.data.files import Dates, date_text
from segfit.tasks.forecasting.data.table import Progress, Table, csv_table, waves_table

PARTS = ("train", "val", "test", "future")
Rows = NDArray[np.int64]

_DAY = 86400
_NEVER = np.iinfo(np.int64).max
_SHOWN = 50  # problems in one message


@dataclass
class SeriesSet:
    """Series that are ready to be cut into windows."""

    table: Table
    first: Mapping[str, Rows]  # part → (series,), the row at which its first window begins
    counts: Mapping[str, Rows]  # part → (series,), its windows
    # Of the training part: "mean" and "std" (series, columns), "scale", the error of the seasonal naive forecast there
    # (series, targets).
    statistics: Mapping[str, NDArray[np.float64]]
    season: int  # rows of a season; 1: there is none
    notices: list[str]  # lines for the log
    _places: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device, place: str) -> dict[str, Tensor]:
        """Return "values" (N, columns) float32, "dates" (N,) int64, and the `statistics` as float32.

        They lie on a device, or on the host where they are to stay there or do not fit.
        """
        size = self.table.values.nbytes + self.table.dates.nbytes
        there = str(device) in self._places or fits(size, device)
        if place in ("host", "loader") or (place == "auto" and not there):
            device = torch.device("cpu")
        if str(device) not in self._places:
            tensors = {"values": self.table.values, "dates": torch.from_numpy(self.table.dates)}
            for key, values in self.statistics.items():
                tensors[key] = torch.from_numpy(values).float()
            self._places[str(device)] = {key: one.to(device) for key, one in tensors.items()}
        return self._places[str(device)]


class LazySeries:
    """The series of a config, read when they are first needed."""

    progress: Progress | None = None  # called with (done, total) files

    def __init__(self, data: DictConfig) -> None:
        self.data = data

    @cached_property
    def series(self) -> SeriesSet:
        """The series; raises a SegFitError with everything that is wrong."""
        waves = self.data.name == "waves"
        table = waves_table(self.data) if waves else csv_table(self.data, self.progress)
        return prepare(table, self.data)


def prepare(table: Table, data: DictConfig) -> SeriesSet:
    """Return the series of a table, cut and looked through.

    Raises a SegFitError with everything that is wrong with them, unless `data.on_bad_sample=skip` leaves them out.
    """
    window, skip = data.lookback + data.horizon, data.on_bad_sample == "skip"
    problems = [list(report.problems) for report in table.reports]
    for found, length in zip(problems, table.ends - table.begins, strict=True):
        if not found and length < window:
            found.append(
                f"{length} rows, but a window has {window} (data.lookback + data.horizon). Shorten one of them, "
                f"or leave the series away."
            )
    good = [number for number, found in enumerate(problems) if not found]
    if not good:
        _judge(table, problems, skip=skip)
    cuts, season = _cuts(table, good, data.split), _season(table, good, data)
    # Rows at which training, validation and testing begin, and where testing ends, of each series.
    bounds = np.array([
        [begin, *(begin + np.searchsorted(table.dates[begin:end], cuts))]
        for begin, end in zip(table.begins, table.ends, strict=True)
    ])  # fmt: skip
    rows = bounds[:, 1] - bounds[:, 0]
    shape, targets = (len(table.names), len(table.layout.columns)), table.layout.targets
    statistics = {"mean": np.zeros(shape), "std": np.ones(shape)}
    statistics["scale"] = np.ones((shape[0], targets))
    for number in good:
        if rows[number] >= window:
            train = slice(*bounds[number, :2])
            problems[number] += _measure(table, number, train, season, statistics)
    notices = _judge(table, problems, skip=skip)
    fine = np.array([not found for found in problems])
    used = (rows >= window) & fine
    if not used.any():
        raise SegFitError(
            f"no series has a window of {window} rows (data.lookback + data.horizon) to train on: the training part, "
            f"before {date_text(cuts[0])}, has {rows.max()} at most. Shorten a window, or move data.split."
        )
    late = [table.names[number] for number in np.flatnonzero(fine & ~used)]
    if late:
        notices.append(
            f"{len(late)} series have no window to train on before {date_text(cuts[0])}, and are left out: {some(late)}."
        )
    first, counts = _windows(table, bounds, used, data)
    return SeriesSet(table, first, counts, statistics, season, notices)


def _cuts(table: Table, good: Sequence[int], split: DictConfig) -> tuple[int, int, int]:
    """Return the dates at which validation and testing begin, and the one at which testing ends."""
    if split.val_from is not None:
        return _seconds(split.val_from), _seconds(split.test_from), _NEVER
    spans = [table.dates[table.begins[number] : table.ends[number]] for number in good]
    if split.months is not None:
        months = np.cumsum([30 * _DAY * count for count in split.months])
        val, test, end = (min(int(span[0]) for span in spans) + months).tolist()
        return val, test, end
    dates = np.unique(np.concatenate(spans)) if len(spans) > 1 else spans[0]
    test = len(dates) - round(split.test * len(dates))
    val = min(test - round(split.val * len(dates)), len(dates) - 1)
    return int(dates[val]), int(dates[test]) if test < len(dates) else _NEVER, _NEVER


def _seconds(date: str | None) -> int:
    if date is None:
        return _NEVER
    return int(datetime.fromisoformat(date).replace(tzinfo=timezone.utc).timestamp())


def _windows(
    table: Table, bounds: Rows, used: NDArray[np.bool_], data: DictConfig
) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Return where the windows of each part begin, and how many there are, of each series.

    What is forecast lies in the part as a whole; what it is forecast from may lie before.
    """
    lookback, horizon = data.lookback, data.horizon
    begin, val, test, end = bounds.T
    first = {
        "train": begin,
        "val": np.maximum(val - lookback, begin),
        "test": np.maximum(test - lookback, begin),
        "future": np.maximum(table.ends - lookback, begin),
    }
    last = {"train": val, "val": test, "test": end}
    counts = {
        part: np.where(used, np.maximum(stop - horizon - lookback - first[part] + 1, 0), 0)
        for part, stop in last.items()
    }
    whole = (table.stops - table.ends >= horizon) | (table.layout.known == 0)
    counts["future"] = np.where(used & whole, 1, 0)
    return first, counts


def _measure(
    table: Table, number: int, train: slice, season: int, statistics: Mapping[str, Any]
) -> list[str]:
    """Write down the statistics of a series' training part; return what is wrong with it."""
    layout = table.layout
    rows = table.values[train].numpy().astype(np.float64)
    constant = np.ptp(rows, axis=0) == 0
    statistics["mean"][number] = rows.mean(0)
    statistics["std"][number] = np.where(constant, 1.0, rows.std(0))
    targets = rows[:, : layout.targets]
    scale = np.abs(targets[season:] - targets[:-season]).mean(0)
    # No score is a multiple of nothing.
    statistics["scale"][number] = np.where(scale == 0, np.nan, scale)
    return [
        f"{layout.columns[place]}: constant in the training part ({rows[0, place]:g}). Leave it out: data.columns=[…]"
        for place in np.flatnonzero(constant[: layout.inputs])
    ]


def _season(table: Table, good: Sequence[int], data: DictConfig) -> int:
    """Return the rows of a season: a day, a week, a year or 1, by the steps of the first series."""
    if data.season is not None or data.returns:
        return int(data.season or 1)
    dates: Dates = table.dates[table.begins[good[0]] : table.ends[good[0]]]
    step = int(np.median(np.diff(dates)))
    if step < _DAY:
        season = _DAY // max(step, 1)
    else:
        weekdays = len(np.unique(dates // _DAY % 7))
        season = {1: weekdays, 7: 52, 30: 12, 31: 12, 91: 4, 92: 4}.get(step // _DAY, 1)
    return season if season <= data.lookback else 1


def _judge(table: Table, problems: Sequence[Sequence[str]], *, skip: bool) -> list[str]:
    """Return what is to be logged; raise a SegFitError with everything that is wrong, unless it is to be skipped."""
    names, reports = table.files or table.names, table.reports
    pairs = list(zip(names, problems, strict=True))
    lines = [f"{name}: {text}" for name, texts in pairs for text in texts]
    shown, bad = lines[:_SHOWN], sum(map(bool, problems))
    if len(lines) > _SHOWN:
        shown.append(f"… and {len(lines) - _SHOWN} more problems, in {bad} series altogether.")
    if lines and (not skip or bad == len(names)):
        raise SegFitError(shown)
    left_out = [f"{line} data.on_bad_sample=skip: the series is left out." for line in shown]
    noticed = zip(names, (report.notices for report in reports), strict=True)
    return [*left_out, *[f"{name}: {text}" for name, texts in noticed for text in texts][:_SHOWN]]
