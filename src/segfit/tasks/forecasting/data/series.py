"""Series cut by time and standardised by their training part, wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from segfit.data.files import some
from segfit.errors import SegFitError
from segfit.tasks.forecasting.data.files import Dates
from segfit.tasks.forecasting.data.table import Progress, Table, csv_table, waves_table

PARTS = ("train", "val", "test", "future")
Rows = NDArray[np.int64]
Statistics = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]

_DAY = 86400
_NEVER = np.iinfo(np.int64).max
_SHOWN = 50  # problems in one message


class Place(NamedTuple):
    """Where windows are gathered; all on one device."""

    values: Tensor  # (N, columns) float32
    dates: Tensor  # (N,) int64
    mean: Tensor  # (series, columns) float32, of the training part
    std: Tensor  # (series, columns) float32
    scale: Tensor  # (series, targets) float32, error of the seasonal naive forecast there


@dataclass
class SeriesSet:
    """Series that are ready to be cut into windows.

    Args:
        table: their rows.
        first: part → (series,) the row at which its first window begins.
        counts: part → (series,) its windows.
        statistics: mean and std (series, columns), scale (series, targets), float64.
        season: rows of a season; 1: there is none.
        notices: lines for the log.
    """

    table: Table
    first: Mapping[str, Rows]
    counts: Mapping[str, Rows]
    statistics: Statistics
    season: int
    notices: list[str]

    def __post_init__(self) -> None:
        self._places: dict[str, Place] = {}

    def on(self, device: torch.device, place: str) -> Place:
        """Return the series on a device, or on the host where they are to stay there or do not fit."""
        if place in ("host", "loader") or (place == "auto" and not self._fits(device)):
            device = torch.device("cpu")
        if str(device) not in self._places:
            tensors = (torch.from_numpy(values).float() for values in self.statistics)
            everything = (self.table.values, torch.from_numpy(self.table.dates), *tensors)
            self._places[str(device)] = Place(*(tensor.to(device) for tensor in everything))
        return self._places[str(device)]

    def _fits(self, device: torch.device) -> bool:
        if device.type != "cuda" or str(device) in self._places:
            return True
        free, _ = torch.cuda.mem_get_info(device)
        return self.table.values.nbytes + self.table.dates.nbytes < free / 2


class LazySeries:
    """Reads the series of a config when they are first needed."""

    def __init__(self, data: DictConfig) -> None:
        self.data = data
        self._series: SeriesSet | None = None

    def get(self, progress: Progress | None = None) -> SeriesSet:
        """Return them.

        Args:
            progress: called with (done, total) files while they are read.

        Raises:
            SegFitError: with everything that is wrong with them.
        """
        if self._series is None:
            table = (
                waves_table(self.data)
                if self.data.name == "waves"
                else csv_table(self.data, progress)
            )
            self._series = prepare(table, self.data)
        return self._series


def prepare(table: Table, data: DictConfig) -> SeriesSet:
    """Return the series of a table, cut and looked through.

    Raises:
        SegFitError: with everything that is wrong with them, unless `data.on_bad_sample=skip` leaves them out.
    """
    window = data.lookback + data.horizon
    problems = [list(report.problems) for report in table.reports]
    for number, (begin, end) in enumerate(zip(table.begins, table.ends, strict=True)):
        if not problems[number] and end - begin < window:
            problems[number].append(
                f"{end - begin} rows, but a window has {window} (data.lookback + data.horizon). Shorten one of them, "
                f"or leave the series away."
            )
    good = [number for number, found in enumerate(problems) if not found]
    statistics = _nothing(table)
    cuts = _cuts(table, good, data.split) if good else (0, 0, 0)
    bounds = np.array([_bounds(table, number, cuts) for number in range(len(table.names))])
    season = _season(table, good, data) if good else 1
    for number in good:
        begin, stop = bounds[number, :2]
        if stop - begin >= window:
            problems[number] += _measure(table, number, slice(begin, stop), season, statistics)
    bad = {number for number, found in enumerate(problems) if found}
    notices = _judge(table, problems, bad, skip=data.on_bad_sample == "skip")
    early = (bounds[:, 1] - bounds[:, 0] >= window) & ~np.isin(np.arange(len(bounds)), [*bad])
    late = [
        name for number, name in enumerate(table.names) if not early[number] and number not in bad
    ]
    if not early.any():
        rows = bounds[:, 1] - bounds[:, 0]
        raise SegFitError(
            f"no series has a window of {window} rows (data.lookback + data.horizon) to train on: the training part, "
            f"before {_text(cuts[0])}, has {rows.max()} at most. Shorten a window, or move data.split."
        )
    if late:
        notices.append(
            f"{len(late)} series have no window to train on before {_text(cuts[0])}, and are left out: {some(late)}."
        )
    first, counts = _windows(table, bounds, early, data)
    return SeriesSet(table, first, counts, statistics, season, notices)


def _nothing(table: Table) -> Statistics:
    shape, targets = (len(table.names), len(table.layout.columns)), table.layout.targets
    return np.zeros(shape), np.ones(shape), np.ones((shape[0], targets))


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
    val = test - round(split.val * len(dates))
    return (
        int(dates[min(val, len(dates) - 1)]),
        int(dates[test]) if test < len(dates) else _NEVER,
        _NEVER,
    )


def _seconds(date: str | None) -> int:
    if date is None:
        return _NEVER
    return int(datetime.fromisoformat(date).replace(tzinfo=timezone.utc).timestamp())


def _text(seconds: int) -> str:
    return str(np.datetime64(int(seconds), "s")).replace("T00:00:00", "").replace("T", " ")


def _bounds(table: Table, number: int, cuts: tuple[int, int, int]) -> list[int]:
    """Return the rows at which a series' training, validation and testing begin, and where testing ends."""
    begin = int(table.begins[number])
    dates = table.dates[begin : table.ends[number]]
    return [begin, *(begin + int(np.searchsorted(dates, cut)) for cut in cuts)]


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
    table: Table,
    number: int,
    train: slice,
    season: int,
    statistics: Statistics,
) -> list[str]:
    """Write down the statistics of a series' training part; return what is wrong with it."""
    layout = table.layout
    rows = table.values[train].numpy().astype(np.float64)
    mean, std, scale = statistics
    constant = np.ptp(rows, axis=0) == 0
    mean[number] = rows.mean(0)
    std[number] = np.where(constant, 1.0, rows.std(0))
    targets = rows[:, : layout.targets]
    scale[number] = np.abs(targets[season:] - targets[:-season]).mean(0)
    scale[number][scale[number] == 0] = np.nan  # no score is a multiple of nothing
    names = [layout.columns[place] for place in np.flatnonzero(constant[: layout.inputs])]
    return [
        f"{name}: constant in the training part ({rows[0, layout.columns.index(name)]:g}). Leave it out: data.columns=[…]"
        for name in names
    ]


def _season(table: Table, good: Sequence[int], data: DictConfig) -> int:
    """Return the rows of a season: a day, a week, a year or 1, by the steps of the first series."""
    if data.season is not None or data.returns:
        return int(data.season or 1)
    dates: Dates = table.dates[table.begins[good[0]] : table.ends[good[0]]]
    step = int(np.median(np.diff(dates)))
    weekdays = len(np.unique(dates // _DAY % 7))
    if step < _DAY:
        season = _DAY // max(step, 1)
    else:
        usual = {1: weekdays, 7: 52, 30: 12, 31: 12, 91: 4, 92: 4}
        season = usual.get(step // _DAY, 1)
    return season if season <= data.lookback else 1


def _judge(
    table: Table, problems: Sequence[Sequence[str]], bad: set[int], *, skip: bool
) -> list[str]:
    """Return what is to be logged.

    Raises:
        SegFitError: with everything that is wrong, unless it is to be skipped.
    """

    def where(number: int) -> str:
        return str(table.files[number] if table.files else table.names[number])

    lines = [f"{where(number)}: {text}" for number in sorted(bad) for text in problems[number]]
    shown = lines[:_SHOWN]
    if len(lines) > _SHOWN:
        shown.append(f"… and {len(lines) - _SHOWN} more problems, in {len(bad)} series altogether.")
    if lines and (not skip or len(bad) == len(table.names)):
        raise SegFitError(shown)
    left_out = [f"{line} data.on_bad_sample=skip: the series is left out." for line in shown]
    notices = [
        f"{where(number)}: {text}"
        for number, report in enumerate(table.reports)
        for text in report.notices
    ]
    return [*left_out, *notices[:_SHOWN]]
