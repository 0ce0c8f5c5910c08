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
    ("step", "written"),
    [
        ("D", lambda days: days.strftime("%Y-%m-%d")),
        ("D", lambda days: days.strftime("%Y%m%d").astype(int)),
        ("D", lambda days: days.strftime("%m/%d/%Y")),
        ("D", lambda days: days.strftime("%d.%m.%Y")),
        ("D", lambda days: days.tz_localize("UTC").strftime("%Y-%m-%dT%H:%M:%S%z")),
        ("D", lambda days: (days - pd.Timestamp("1899-12-30")).days),
        ("h", lambda days: (days - pd.Timestamp("1899-12-30")) / pd.Timedelta("1D")),
        ("h", lambda days: days.as_unit("s").astype("int64")),
        ("h", lambda days: days.as_unit("ms").astype("int64")),
        ("h", lambda days: days.as_unit("us").astype("int64")),
        ("h", lambda days: days.as_unit("ns").astype("int64")),
        ("h", lambda days: days.strftime("%Y%m%d%H").astype("int64")),
        ("min", lambda days: days.strftime("%Y%m%d%H%M").astype("int64")),
        ("s", lambda days: days.strftime("%Y%m%d%H%M%S").astype("int64")),
        ("MS", lambda days: days.strftime("%Y%m").astype(int)),
        ("MS", lambda days: days.strftime("%d/%m/%Y")),
        ("MS", lambda days: days.strftime("%m/%d/%Y")),
        ("YS", lambda days: days.year),
    ],
)
def test_dates_are_read_however_they_are_written(tmp_path, step, written):
    days = pd.date_range("2003-01-01", periods=100, freq=step)
    write(frame(date=written(days)), tmp_path / "a.csv")
    found = series_of(tmp_path).table.dates
    assert found.tolist() == days.to_numpy("datetime64[s]").astype(int).tolist()


def test_years_before_1970_and_seconds_that_look_like_hours_are_read(tmp_path):
    write(frame(date=np.arange(1780, 1880)), tmp_path / "a.csv")
    assert series_of(tmp_path).table.dates[0] == np.datetime64("1780-01-01", "s").astype(int)
    hours = pd.date_range("2031-01-01", periods=100, freq="h").as_unit("s").astype("int64")
    write(frame(date=hours), tmp_path / "a.csv")  # 1924992000, …
    assert series_of(tmp_path).table.dates.tolist() == hours.tolist()


def test_numbers_that_are_no_dates_are_refused(tmp_path):
    for numbers in (np.arange(100), np.arange(9000, 9100), np.arange(100) + 0.5):
        (found,) = problems(tmp_path, a=frame(date=numbers))
        assert f"date: 100 dates are not understood, e.g. '{numbers[0]}' in line 2." in found


@pytest.mark.parametrize(
    "options",
    [{"sep": ";", "decimal": ","}, {"sep": ";"}, {"sep": "\t"}, {"sep": "|"}]
    + [{"encoding": encoding} for encoding in ("utf-16", "utf-8-sig", "latin-1")],
)
def test_files_are_read_however_they_are_written(tmp_path, options):
    table = frame(columns=["a", "größe"])
    (tmp_path / "set").mkdir()
    table.to_csv(tmp_path / "set/a.csv", index=False, **options)
    found = series_of(tmp_path / "set").table
    assert found.layout.columns == ("a", "größe")
    assert np.allclose(found.values.numpy(), table[["a", "größe"]])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("date,a\n" + "2024-01-01,1,5\n" * 3, "as with decimal commas between commas"),
        ("date;a\n" + "2024-01-01;1,500\n" * 3, "a: 3 values are no numbers, e.g. '1,500'"),
        ("date,a\n2024-01-01,1\n" + "2024-01-02,1,5\n" * 3, "Expected 2 fields in line 3, saw 3"),
        ("date,${oc.env:HOME}\n" + "2024-01-01,1\n" * 3, "rename ${oc.env:HOME}, or leave it out"),
        ("", "cannot be read"),
        ("d\0a\0t\0e\0,\0a\0\n\0", "save it as CSV in UTF-8"),
    ],
)
def test_ambiguous_files_are_refused(tmp_path, text, said):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.csv").write_text(text)
    assert said in "\n".join(problems(tmp_path))


def test_columns_without_a_name_are_no_targets(tmp_path):
    frame().to_csv(tmp_path / "a.csv")
    layout = series_of(tmp_path).table.layout
    assert (layout.date, layout.columns, layout.left_out) == ("date", ("a", "b"), ("Unnamed: 0",))
    frame().set_index("date").rename_axis(None).to_csv(tmp_path / "a.csv")
    layout = series_of(tmp_path).table.layout
    assert (layout.date, layout.columns, layout.left_out) == ("Unnamed: 0", ("a", "b"), ())


def test_the_first_file_that_can_be_read_says_which_columns_there_are(tmp_path):
    write(frame(), tmp_path / "set" / "b.csv")
    (tmp_path / "set/a.csv").write_text("")
    found = series_of(tmp_path / "set", "data.on_bad_sample=skip")
    assert found.table.layout.columns == ("a", "b")
    assert any("a.csv: cannot be read" in line for line in found.notices)


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
