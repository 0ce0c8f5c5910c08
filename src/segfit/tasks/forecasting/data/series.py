"""Series cut by time and standardised by their training part; windows of them, gathered where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from segfit.data.batches import Batch, Indices
from segfit.data.source import Arrays, some
from segfit.errors import SegFitError
from segfit.system.hardware import fits
from segfit.tasks.forecasting.data.dates import Dates, date_text
from segfit.tasks.forecasting.data.table import Progress, Table, csv_table, waves_table
from segfit.tasks.forecasting.schema import utc_seconds

PARTS = ("train", "val", "test", "future")
Rows = NDArray[np.int64]

_CPU = torch.device("cpu")
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
            device = _CPU
        if str(device) not in self._places:
            tensors = {"values": self.table.values, "dates": torch.from_numpy(self.table.dates)}
            for key, values in self.statistics.items():
                tensors[key] = torch.from_numpy(values).float()
            self._places[str(device)] = {key: one.to(device) for key, one in tensors.items()}
        return self._places[str(device)]

    def standardise(self, standards: Mapping[str, Any]) -> None:
        """Take "mean" and "std" from those of a run, by the names of its series; others keep their own."""
        for number, name in enumerate(self.table.names):
            for key in ("mean", "std") if name in standards else ():
                self.statistics[key][number] = standards[name][key]
        self._places.clear()


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
    lookback, window = data.lookback, data.lookback + data.horizon
    skip, problems = data.on_bad_sample == "skip", [[*one.problems] for one in table.reports]
    for found, report in zip(problems, table.reports, strict=True):
        if not found and report.observed < window:
            found.append(
                f"{report.observed} rows, but a window has {window} (data.lookback + data.horizon). Shorten one of "
                "them, or leave the series away."
            )
    good = [number for number, found in enumerate(problems) if not found]
    if not good:
        _judge(table, problems, skip=skip)
    cuts, season = _cuts(table, good, data.split), _season(table, good, data)
    # Rows at which training, validation and testing begin, and where testing ends, of each series.
    begin, val, test, end = np.array([
        [begin, *(begin + np.searchsorted(table.dates[begin:end], cuts))]
        for begin, end in zip(table.begins, table.ends, strict=True)
    ]).T  # fmt: skip
    rows = val - begin
    shape, targets = (len(table.names), len(table.layout.columns)), table.layout.targets
    statistics = {"mean": np.zeros(shape), "std": np.ones(shape)}
    statistics["scale"] = np.ones((shape[0], targets))
    for number in good:
        if rows[number] >= window:
            train = slice(begin[number], val[number])
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
    # What is forecast lies in the part as a whole; what it is forecast from may lie before.
    parts = {"train": (begin + lookback, val), "val": (val, test), "test": (test, end)}
    first = {part: np.maximum(start - lookback, begin) for part, (start, _) in parts.items()}
    first["future"] = np.maximum(table.ends - lookback, begin)
    counts = {
        part: used * np.maximum(stop - window - first[part] + 1, 0)
        for part, (_, stop) in parts.items()
    }
    known = (table.stops - table.ends >= data.horizon) | (table.layout.known == 0)
    counts["future"] = (used & known).astype(np.int64)
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
    return utc_seconds(date)


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
    names = table.files or table.names
    lines = [f"{name}: {one}" for name, texts in zip(names, problems, strict=True) for one in texts]
    if more := len(lines[_SHOWN:]):
        lines[_SHOWN:] = [f"… and {more} more problems."]
    if lines and not (skip and [] in problems):
        raise SegFitError(lines)
    left_out = [f"{line} data.on_bad_sample=skip: the series is left out." for line in lines]
    noticed = [(n, report.notices) for n, report in zip(names, table.reports, strict=True)]
    return left_out + [f"{name}: {one}" for name, ones in noticed for one in ones][:_SHOWN]


class Windows:
    """The windows of a part of all series: series after series, each from its oldest window on.

    A `Source`, and a dataset of its samples, for a `GatheringLoader` or, with data.place=loader as plain loops do it, for data
    workers. All parts, "train", "val", "test" and "future", share the series.
    """

    def __init__(self, lazy: LazySeries, part: str, data: DictConfig) -> None:
        self.lazy, self.part = lazy, part
        self.lookback, self.horizon = int(data.lookback), int(data.horizon)
        self.place = str(data.place)
        self.gathers = self.place != "loader"
        self.source = self  # as a dataset, it is its own

    @property
    def series(self) -> SeriesSet:
        """The series themselves."""
        return self.lazy.series

    @cached_property
    def ends(self) -> Rows:
        """The number of windows up to and with each series, (series,)."""
        return np.cumsum(self.series.counts[self.part])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, indices: Indices) -> tuple[Rows, Rows, Rows]:
        """Return the series of windows, their numbers within it, and the rows at which they begin, (B,) each."""
        at = np.asarray(indices)
        which = np.searchsorted(self.ends, at, side="right")
        number = at - (self.ends[which] - self.series.counts[self.part][which])
        return which, number, self.series.first[self.part][which] + number

    def id(self, index: int) -> str:
        """Return the name of the series and the date of the last row that is seen."""
        which, _, row = self.locate([index])
        date = np.datetime64(int(self.series.table.dates[row[0] + self.lookback - 1]), "s")
        return f"{self.series.table.names[which[0]]}@{date}"

    where = id

    def files(self, index: int) -> list[Path]:
        """Return the file of the series."""
        files = self.series.table.files
        return [files[self.locate([index])[0][0]]] if files else []

    def read(self, index: int) -> Arrays:
        """Return a window, (lookback + horizon, columns) float32."""
        return (self[index]["window"].numpy(),)

    def __getitem__(self, key: Any) -> Batch:
        """Return the sample for an index, or for (index, seed)."""
        batch = self.batch([key[0] if isinstance(key, tuple) else key], _CPU)
        return {name: values[0] for name, values in batch.items()}

    def batch(self, indices: Indices, device: torch.device) -> Batch:
        """Return windows as a batch, on the device if the series lie there, else on the host."""
        place, table = self.series.on(device, self.place), self.series.table
        own = place["values"].device
        which, _, begin = (_moved(part, own) for part in self.locate(indices))
        rows = begin[:, None] + torch.arange(self.lookback + self.horizon, device=own)
        if self.part == "future":
            rows = rows.clamp(max=len(place["values"]) - 1)
        # (B, lookback + horizon, columns) float32, true values; index_select takes a third of the time of values[rows] on a
        # CPU.
        window = place["values"].index_select(0, rows.flatten()).view(*rows.shape, -1)
        if self.part == "future":
            window[:, self.lookback :, : table.layout.inputs] = 0  # what was not observed
        batch = {
            "window": window,
            **{key: place[key][which] for key in self.series.statistics},  # (B, …) float32
            "when": place["dates"][rows[:, self.lookback]],  # (B,) int64, of the first forecast row
            "index": _moved(np.asarray(indices), own),  # (B,) int64
        }
        if own != device and device.type == "cuda":
            return {key: tensor.pin_memory() for key, tensor in batch.items()}
        return batch


def _moved(values: Rows, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    # From pinned memory, so that the host does not wait for the device.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
