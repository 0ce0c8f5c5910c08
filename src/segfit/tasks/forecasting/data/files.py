"""CSV files → numbers and dates, and everything that is wrong with them."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.data.source import Arrays, Named, list_files, relative_name
from segfit.errors import SegFitError, nearest
from segfit.tasks.forecasting.data.dates import Dates, date_text, gaps_of, parsed
from segfit.tasks.forecasting.schema import targets_of

Values = NDArray[np.float64]

_VERSION = 4  # raise it when a file gives other rows or another report
_DATES = ("date", "datetime", "time", "timestamp")
_UNNAMED = "Unnamed: "  # what pandas calls a column without a name, such as row numbers
_HEAD = 65536  # bytes of a file that show how it is written


@dataclass(frozen=True)
class Layout:
    """Which column of a file is what; `columns` are in the order in which they are kept."""

    date: str
    columns: tuple[str, ...]  # targets, then other inputs, then what is known in advance
    targets: int
    known: int
    left_out: tuple[str, ...] = field(default=(), repr=False)  # columns without a name

    @property
    def inputs(self) -> int:
        """The columns whose future is not known, targets included."""
        return len(self.columns) - self.known


def files_of(root: str) -> list[Path]:
    """Return the CSV file, or those of a folder, sorted; raise a SegFitError if there is none."""
    path = Path(root).expanduser()
    found = [path] if path.is_file() else list_files(path, (".csv",))
    if not found:
        raise SegFitError(f"data.root={root}: no such file, and no folder with a .csv file.")
    return found


def layout_of(data: DictConfig) -> Layout:
    """Return what the columns of a data set are; of files, by the config and the header of the first.

    Raises a SegFitError if there is no file, or no column of dates in it.
    """
    if data.name == "waves":
        columns = tuple(f"value_{place}" for place in range(data.columns))
        return Layout("date", columns, data.columns, 0)
    file, header = Path(data.root), list[str]()
    if data.date is None or data.columns is None:  # else nothing but the run's own config counts
        file, header = _first_header(data)
    date = data.date or next((name for name in header if name.lower() in _DATES), None)
    if date is None and header[0].startswith(_UNNAMED):  # pandas writes an index of dates so
        date = header[0]
    if date is None:
        raise SegFitError(
            f"{file}: no column is called {', '.join(_DATES)}. Name the one of the dates: data.date=… "
            f"It has: {', '.join(header[:20])}."
        )
    known = list(data.known)
    read = data.columns or [name for name in header if not name.startswith(_UNNAMED)]
    left_out = () if data.columns else tuple({*header} - {*read, date})
    rest = [name for name in read if name != date and name not in known]
    targets = targets_of(data) or rest
    if odd := [name for name in (date, *read) if "${" in name or name == "???"]:
        raise SegFitError(f"{file}: rename {', '.join(odd)}, or leave it out: data.columns=[…].")
    if not targets:
        raise SegFitError(f"{file}: there is no column to forecast besides {date}.")
    columns = (*targets, *(name for name in rest if name not in targets), *known)
    return Layout(date, columns, len(targets), len(known), left_out)


def _first_header(data: DictConfig) -> tuple[Path, list[str]]:
    """Return the first file and its columns; with data.on_bad_sample=skip the first that can be read."""
    *files, last = files_of(data.root)
    for file in files:
        try:
            return file, _header(file)
        except SegFitError:
            if data.on_bad_sample != "skip":
                raise
    return last, _header(last)


def _header(file: Path) -> list[str]:
    try:
        return list(pd.read_csv(file, nrows=0, **_writing(file)).columns)
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        raise SegFitError(f"{file}: cannot be read ({_reason(error)}).") from error


def _writing(file: Path) -> dict[str, Any]:
    """Return how a file is written, as options of `pandas.read_csv`, by its beginning."""
    with file.open("rb") as opened:
        head = opened.read(_HEAD)
    encoding = "utf-16" if head[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    if encoding == "utf-8":
        if b"\0" in head:
            raise ValueError("it is no text in UTF-8; save it as CSV in UTF-8")
        try:
            head.partition(b"\n")[0].decode()
        except UnicodeDecodeError:
            encoding = "latin-1"
    header, *lines = head.decode(encoding, "replace").splitlines() or [""]
    unquoted = re.sub(r'"[^"]*"', "", header)
    separator = max(",;\t|", key=unquoted.count)  # of equal ones the first
    values = [value.strip(' "') for line in lines for value in line.split(separator)]
    commas = [value for value in values if re.fullmatch(r"[-+]?\d*,\d+", value)]
    # Not where a comma may stand between thousands; then the values are no numbers, and said to be none.
    plain = any(not re.fullmatch(r"[-+]?[1-9]\d{0,2},\d{3}", value) for value in commas)
    points = any(re.fullmatch(r"[-+]?\d*\.\d+", value) for value in values)
    decimal = "," if separator != "," and plain and not points else "."
    options = {"encoding": encoding, "sep": separator, "decimal": decimal}
    return options | {"encoding_errors": "replace"}  # text beyond the header is no number anyway


@dataclass
class Report:
    """What a file is like besides its numbers."""

    rows: int = 0
    observed: int = 0  # of them, up to the last with targets; then comes what is known in advance
    problems: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def refuse(
        self, name: str, wrong: Any, what: str, remedy: str, *, first: int = 2, column: Any = None
    ) -> None:
        """Add a problem of a column if something is `wrong` (N,) bool in it; `first` is the line of the first."""
        if len(places := np.flatnonzero(wrong)):
            place = places[0]
            given = "the first" if column is None else f"e.g. {str(column.iloc[place])[:40]!r}"
            where = f"{given} in line {place + first}"
            self.problems.append(f"{name}: {len(places)} {what}, {where}. {remedy}")


class SeriesFiles(Named):
    """A `Source` whose samples are the files of a config, whole."""

    def __init__(self, data: DictConfig) -> None:
        root = Path(data.root).expanduser()
        self.folder = root if root.is_dir() else root.parent
        self.paths, self.layout = files_of(data.root), layout_of(data)
        self.names = [relative_name(path, self.folder) for path in self.paths]
        self.returns, self.on_missing = bool(data.returns), str(data.on_missing)
        self.reading = repr((_VERSION, self.layout, self.returns, self.on_missing))

    def files(self, index: int) -> list[Path]:
        """Return the file."""
        return [self.paths[index]]

    def read(self, index: int) -> Arrays:
        """Return values (N, columns) float32, dates (N,) int64 in seconds since 1970, and a `Report` as JSON, uint8.

        What is wrong with the file is in the report; there are no rows then.
        """
        report, file, layout = Report(), self.paths[index], self.layout
        values, dates = np.empty((0, len(layout.columns))), np.empty(0, np.int64)
        names = (layout.date, *layout.columns)
        try:
            frame = pd.read_csv(file, **_writing(file))  # usecols would cut rows that are too long
            if not isinstance(frame.index, pd.RangeIndex):
                report.problems.append(
                    "rows have more values than the header has names, as with decimal commas between commas. Save it with "
                    "decimal points, or with ; between the columns."
                )
            report.problems += [
                f"there is no column {name}.{nearest(name, _header(file))}"
                for name in names
                if name not in frame
            ]
            if not len(frame):
                report.problems.append("there are no rows.")
            if not report.problems:
                values, dates = self._parsed(frame, report)
            for change in (self._complete, self._returns):
                if not report.problems:
                    values, dates = change(values, dates, report)
        except (OSError, ValueError) as error:
            report.problems.append(f"cannot be read ({_reason(error)}).")
        if report.problems:
            values, dates, report.observed = values[:0], dates[:0], 0
        report.rows = len(dates)
        text = json.dumps(vars(report)).encode()
        return values.astype(np.float32), dates, np.frombuffer(text, np.uint8)

    def _parsed(self, frame: Any, report: Report) -> tuple[Values, Dates]:
        """Return the numbers of a file, NaN where there is none, and its dates."""
        layout = self.layout
        dates = _dates(frame[layout.date], report)
        columns = [_numbers(frame[name], report) for name in layout.columns]
        values = np.column_stack(columns).astype(np.float64)
        values[np.abs(values) > np.finfo(np.float32).max] = np.nan  # infinite on the device
        there = np.flatnonzero(~np.isnan(values[:, : layout.inputs]).all(1))
        report.observed = int(there.max(initial=-1)) + 1 if layout.known else len(values)
        return values, dates

    def _complete(self, values: Values, dates: Dates, report: Report) -> tuple[Values, Dates]:
        """Return rows without missing values, in one regular order if they had one."""
        inputs, remedy = self.layout.inputs, "Set data.on_missing=ffill or drop, or mend the file."
        fails, fills = self.on_missing == "fail", self.on_missing == "ffill"
        missing = np.isnan(values)
        missing[report.observed :, :inputs] = False
        gaps, step = gaps_of(dates)
        regular = bool(len(gaps) and step)
        if len(gaps):
            text = f"{len(gaps)} gaps in the dates, the first after {date_text(dates[gaps[0]])}"
            if fails and regular:
                report.problems.append(f"{text}. {remedy}")
            else:
                left = "filled" if fills and regular else "left as they are"
                report.notices.append(f"{text}, {left}.")
        if fails:
            for name, wrong in zip(self.layout.columns, missing.T, strict=True):
                report.refuse(name, wrong, "values are missing or infinite", remedy)
            return values, dates
        if missing.any():
            filled, dropped = missing.sum(), missing.any(1).sum()
            done = f"{filled} values filled in" if fills else f"{dropped} rows left out"
            report.notices.append(f"{done}, missing or infinite (data.on_missing).")
        if fills:
            values[missing] = pd.DataFrame(values).ffill().to_numpy()[missing]  # from before alone
            grid = np.arange(dates[0], dates[-1] + 1, step) if regular else dates
            chosen = np.searchsorted(dates, grid, side="right") - 1
            begun = np.logical_or.accumulate(~np.isnan(values[chosen, :inputs]).any(1))
            chosen, dates = chosen[begun], grid[begun]
        else:
            chosen = np.flatnonzero(~missing.any(1))
            dates = dates[chosen]
        report.observed = int(np.searchsorted(chosen, report.observed))
        return values[chosen], dates

    def _returns(self, values: Values, dates: Dates, report: Report) -> tuple[Values, Dates]:
        """Return the logarithmic returns of prices, and the other columns as they are, from the second row on."""
        if not self.returns or not len(values):
            return values, dates
        targets, remedy = self.layout.targets, "Set data.returns=false, or mend the file."
        for name, prices in zip(self.layout.columns[:targets], values.T, strict=False):
            report.refuse(name, prices <= 0, "values are not above 0 and have no returns", remedy)
        with np.errstate(divide="ignore", invalid="ignore"):
            returns = np.diff(np.log(values[:, :targets]), axis=0)
        report.observed -= 1
        return np.concatenate([returns, values[1:, targets:]], 1), dates[1:]


def _numbers(column: Any, report: Report) -> Any:
    """Return a column's values, NaN where there is none; text is a problem."""
    numbers = pd.to_numeric(column, errors="coerce")
    remedy = "Mend them, or name the columns to read: data.columns=[…]"
    text = numbers.isna() & column.notna()
    report.refuse(column.name, text, "values are no numbers", remedy, column=column)
    return numbers


def _dates(column: Any, report: Report) -> Dates:
    """Return dates as seconds since 1970, UTC; those that are no dates, or do not rise, are a problem."""
    found = parsed(column)
    remedy = "Write them as 2024-01-31 or 2024-01-31 13:00, or name another column: data.date=…"
    report.refuse(column.name, found.isna(), "dates are not understood", remedy, column=column)
    if report.problems:
        return np.zeros(len(column), np.int64)
    dates: Dates = found.dt.tz_localize(None).to_numpy("datetime64[s]").astype(np.int64)
    steps, remedy = np.diff(dates), "Keep one row of each; of several series make a file each."
    report.refuse(column.name, steps < 0, "dates are out of order", "Sort the rows.", first=3)
    report.refuse(column.name, steps == 0, "dates occur twice", remedy, first=3)
    return dates


def _reason(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
