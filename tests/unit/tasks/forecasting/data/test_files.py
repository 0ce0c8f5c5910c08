"""What is wrong with series is said before the first step, all of it at once."""

import numpy as np
import pandas as pd
import pytest

from segfit.errors import SegFitError
from tests.unit.tasks.forecasting.data.tables import frame, series_of, write


def problems(tmp_path, *overrides, **files):
    for name, table in files.items():
        write(table, tmp_path / "set" / f"{name}.csv")
    with pytest.raises(SegFitError) as caught:
        series_of(tmp_path / "set", *overrides)
    return caught.value.problems


def swapped(table, one, other):
    table.iloc[[one, other]] = table.iloc[[other, one]].to_numpy()
    return table


def changed(row, value, column="b"):
    table = frame().astype({column: object})
    table.loc[row, column] = value
    return table


@pytest.mark.parametrize(
    ("table", "text"),
    [
        (swapped(frame(), 3, 4), "date: 1 dates are out of order, the first in line 6."),
        (pd.concat([frame(), frame().tail(1)]), "date: 1 dates occur twice, the first in line 102"),
        (frame().drop(index=[5, 6]), "1 gaps in the dates, the first after 2024-01-01 04:00:00"),
        (changed(7, "n.n."), "b: 1 values are no numbers, e.g. 'n.n.' in line 9."),
        (changed(7, None), "b: 1 values are missing or infinite, the first in line 9."),
        (changed(7, np.inf), "b: 1 values are missing or infinite, the first in line 9."),
        (changed(7, 1e300), "b: 1 values are missing or infinite, the first in line 9."),
        (frame(b=3.5), "b: constant in the training part (3.5)."),
        (frame(11), "11 rows, but a window has 12"),
        (frame(0), "there are no rows."),
        (frame(columns=["a", "c"]), "there is no column b. Did you mean"),
        (
            changed(7, "yesterday", "date"),
            "date: 1 dates are not understood, e.g. 'yesterday' in line 9.",
        ),
    ],
)
def test_each_problem_names_file_and_line(tmp_path, table, text):
    (problem,) = problems(tmp_path, "data.columns=[a,b]", bad=table, good=frame())
    assert problem.startswith(f"{tmp_path / 'set' / 'bad.csv'}: ")
    assert text.partition(" Did you")[0] in problem


def test_all_problems_come_at_once_and_can_be_skipped(tmp_path):
    files = {"one": changed(3, "x"), "two": frame(5), "good": frame()}
    found = problems(tmp_path, **files)
    assert len(found) == 2
    series = series_of(tmp_path / "set", "data.on_bad_sample=skip")
    assert [count > 0 for count in series.counts["train"]] == [True, False, False]
    assert len(series.notices) == 2
    assert "the series is left out" in series.notices[0]


def test_a_file_that_is_no_csv_is_named(tmp_path):
    write(frame(), tmp_path / "set" / "a.csv")
    (tmp_path / "set" / "b.csv").write_bytes(b"date,a,b\n1,2,3\n\xff\xfe\x00,1,2,3,4\n")
    (problem,) = problems(tmp_path)
    assert "b.csv: cannot be read" in problem


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ("data.target=clse", "data.columns=null"),
            "there is no column clse. Did you mean 'close'?",
        ),
        (("data.date=day",), "there is no column day."),
        (
            ("data.returns=true", "data.target=b"),
            "b: 1 values are not above 0 and have no returns, the first in line 2",
        ),
        (("data.lookback=70",), "no series has a window of 74 rows"),
    ],
)
def test_what_options_cannot_have_is_said(tmp_path, overrides, text):
    table = frame(columns=["close", "b"])
    table.loc[0, "b"] = 0.0
    assert text in problems(tmp_path, *overrides, a=table)[0]


def test_no_column_of_dates_is_said(tmp_path):
    found = problems(tmp_path, a=frame().rename(columns={"date": "when"}))
    assert "Name the one of the dates: data.date=…" in found[0]


def test_missing_values_are_filled_from_the_past_alone_or_left_out(tmp_path):
    table = frame()
    table.loc[[5, 6], "b"] = [np.nan, np.inf]
    write(table.drop(index=[20]), tmp_path / "a.csv")
    filled = series_of(tmp_path, "data.on_missing=ffill")
    values = filled.table.values.numpy()
    assert len(values) == 100
    assert values[5:7, 1].tolist() == [values[4, 1]] * 2
    assert values[20].tolist() == values[19].tolist()
    assert any("2 values filled in" in line for line in filled.notices)
    dropped = series_of(tmp_path, "data.on_missing=drop")
    assert len(dropped.table.values) == 97
    assert any("2 rows left out" in line for line in dropped.notices)


@pytest.mark.parametrize(
    "dates",
    [
        lambda days: days.strftime("%Y-%m-%d"),
        lambda days: days.strftime("%Y%m%d").astype(int),
        lambda days: days.astype("int64") // 10 ** (9 if days.unit == "ns" else 6),
        lambda days: days.strftime("%m/%d/%Y"),
        lambda days: days.tz_localize("UTC").strftime("%Y-%m-%dT%H:%M:%S%z"),
    ],
)
def test_dates_are_read_however_they_are_written(tmp_path, dates):
    days = pd.date_range("2024-01-01", periods=100, freq="D")
    write(frame(date=dates(days)), tmp_path / "a.csv")
    found = series_of(tmp_path).table.dates
    assert found.tolist() == days.to_numpy("datetime64[s]").astype(int).tolist()


def test_returns_are_logarithmic_and_dated_by_their_end(tmp_path):
    table = frame()
    write(table, tmp_path / "a.csv")
    series = series_of(tmp_path, "data.returns=true", "data.target=b").table
    assert series.layout.columns == ("b", "a")
    expected = np.diff(np.log(table["b"]))
    assert np.allclose(series.values[:, 0].numpy(), expected, atol=1e-7)
    assert np.allclose(series.values[:, 1].numpy(), table["a"][1:], rtol=1e-6)
    assert series.dates[0] == table["date"][1].timestamp()


def test_trading_days_have_no_gaps(tmp_path):
    days = pd.date_range("2024-01-01", periods=100, freq="B")
    write(frame(date=days), tmp_path / "a.csv")
    assert series_of(tmp_path).notices == []
