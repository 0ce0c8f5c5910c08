"""Dates of any usual form → seconds since 1970."""

import re
import warnings
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Dates = NDArray[np.int64]

_REGULAR = 0.95  # share of equal steps from which on any longer step is a gap
_LONG = 10  # times the usual step from which on a series with irregular dates has a gap
# Digits of dates that are written as numbers: 1780, 202401, 20240131, 2024013123, …
_WRITTEN = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
_SINCE_1970 = {"s": (1e8, 1e11), "ms": (1e11, 1e14), "us": (1e14, 1e17), "ns": (1e17, 1e19)}


def parsed(column: Any) -> Any:
    """Return a column's dates (N,) datetime64, UTC, missing where they are not understood."""
    options: dict[str, Any] = {"errors": "coerce", "utc": True}
    if pd.api.types.is_numeric_dtype(column):
        return _numbered(column, options)
    first = str(next(iter(column.dropna()), ""))
    readings: list[dict[str, bool]] = [{}]
    if re.match(r"\s*\d{1,2}\D\d{1,2}\D", first):  # 01/02/2024: with dots the day is first
        readings = [{"dayfirst": "." in first}, {"dayfirst": "." not in first}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of formats that pandas has to guess
        found = [pd.to_datetime(column, **options, **reading) for reading in readings]
    return min(found, key=_unevenness)  # of equal ones the first


def _numbered(column: Any, options: dict[str, Any]) -> Any:
    """Return the dates that numbers mean, by how many digits they have."""
    low, high = column.min(), column.max()
    whole = bool((column.dropna() % 1 == 0).all())
    digits = {len(str(int(value))) for value in (low, high) if np.isfinite(value)}
    if whole and len(digits) == 1 and (count := digits.pop()) in _WRITTEN:
        text = column.astype("Int64").astype("string")
        dates = pd.to_datetime(text, format=_WRITTEN[count], **options)
        years, hours = dates.dt.year, count > 8
        wrong = years.min() < (1900 if hours else 1000) or years.max() >= (2101 if hours else 3000)
        # Of numbers that are seconds since 1970, most are no dates.
        if not wrong and dates.isna().mean() < (0.5 if hours else 1):
            return dates
    if low >= 1e4 and high < 1e5:  # a spreadsheet's days, with the time as their fraction
        days = pd.to_datetime(column, unit="D", origin="1899-12-30", **options)
        return days.dt.round("s")
    for unit, (least, most) in _SINCE_1970.items():
        if least <= high < most:
            return pd.to_datetime(column, unit=unit, **options)
    return pd.to_datetime(column.map(lambda _: None), **options)


def _unevenness(dates: Any) -> tuple[int, int, float]:
    """Return how many dates are not understood, how many do not rise, and how much their steps differ."""
    steps = np.diff(dates.dropna().to_numpy("datetime64[s]").astype(np.int64))
    spread = float(steps.std() / max(abs(steps.mean()), 1e-9)) if len(steps) else 0.0
    return int(dates.isna().sum()), int((steps <= 0).sum()), round(spread, 6)


def gaps_of(dates: Dates) -> tuple[NDArray[np.int64], int]:
    """Return the rows that a gap follows, and the step of a regular series in seconds; 0 for one with irregular dates.

    Trading days and months are irregular: there only what is many steps long is a gap.
    """
    steps = np.diff(dates)
    if not len(steps):
        return np.empty(0, np.int64), 0
    usual = int(np.median(steps))
    regular = bool((steps == usual).mean() >= _REGULAR)
    return np.flatnonzero(steps > (usual if regular else _LONG * usual)), usual if regular else 0


def steady_step(dates: Dates) -> int:
    """Return the usual step in seconds, if most are within a fifth of it, as those of months and trading days; else 0."""
    steps = np.diff(dates)
    usual = int(np.median(steps)) if len(steps) else 0
    return usual if len(steps) and (abs(steps - usual) <= usual / 5).mean() > 0.5 else 0


def date_text(seconds: Any) -> str:
    """Return a date such as 2024-01-31, with its time unless that is midnight."""
    return str(np.datetime64(int(seconds), "s")).replace("T00:00:00", "").replace("T", " ")
