"""Series are cut by time, standardised by their training part, and gathered as NumPy would slice them."""

import numpy as np
import pandas as pd
import pytest
import torch

from segfit.tasks.forecasting.data import files
from segfit.tasks.forecasting.evaluation import following
from tests.unit.tasks.forecasting.data.tables import frame, series_of, windows_of, write

CPU = torch.device("cpu")
PARTS = ("train", "val", "test")


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [
        ((), {"train": 70, "val": 10, "test": 20}),
        (("data.split.val=0.3", "data.split.test=0.1"), {"train": 60, "val": 30, "test": 10}),
        (
            ("data.split.val_from=2024-01-03", "'data.split.test_from=2024-01-04 12:00'"),
            {"train": 48, "val": 36, "test": 16},
        ),
        (
            ("data.split.val_from=2024-01-03T02:00+02:00", "data.split.test_from=2024-01-04T12:00"),
            {"train": 48, "val": 36, "test": 16},
        ),
    ],
)
def test_parts_follow_each_other(tmp_path, overrides, sizes):
    write(frame(), tmp_path / "a.csv")
    overrides = [text.strip("'") for text in overrides]
    overrides = [f"{key}='{value}'" for key, value in (text.split("=") for text in overrides)]
    targets = {}
    for part in PARTS:
        windows = windows_of(tmp_path, part, *overrides)
        _, _, begin = windows.locate(range(len(windows)))
        targets[part] = sorted({row for at in begin for row in range(at + 8, at + 12)})
    assert targets["train"][-1] + 1 == sizes["train"] == targets["val"][0]
    assert targets["val"][-1] + 1 == sizes["train"] + sizes["val"] == targets["test"][0]
    assert targets["test"][-1] == 99


def test_months_are_those_of_the_papers(tmp_path):
    write(frame(24 * 30 * 4), tmp_path / "a.csv")
    counts = [
        len(windows_of(tmp_path, part, "data.split.months=[2,1,1]", "data.lookback=96"))
        for part in PARTS
    ]
    month = 24 * 30
    assert counts == [2 * month - 96 - 4 + 1, month - 4 + 1, month - 4 + 1]


def test_series_of_different_spans_are_cut_at_one_date(tmp_path):
    write(frame(200), tmp_path / "old.csv")
    write(frame(200).iloc[100:], tmp_path / "young.csv")
    write(frame(200).iloc[170:], tmp_path / "late.csv")
    series = series_of(tmp_path)
    ends = {}
    for part in PARTS:
        windows = windows_of(tmp_path, part)
        _, _, begin = windows.locate(range(len(windows)))
        ends[part] = series.table.dates[begin + 11]
    assert ends["train"].max() < ends["val"].min()
    assert ends["val"].max() < ends["test"].min()
    assert "1 series have no window to train on" in series.notices[0]
    assert series.counts["test"].tolist() == [0, 37, 37]  # late, old, young


def test_what_comes_later_changes_nothing(tmp_path):
    table = frame()
    write(table, tmp_path / "a" / "x.csv")
    before = {part: windows_of(tmp_path / "a", part) for part in PARTS}
    for row in (50, 75, 99):
        changed = table.copy()
        changed.loc[row, ["a", "b"]] += 1000.0
        write(changed, tmp_path / str(row) / "x.csv")
        for part, windows in before.items():
            others = windows_of(tmp_path / str(row), part)
            indices = range(len(windows))
            one, other = windows.batch(indices, CPU), others.batch(indices, CPU)
            _, _, begin = windows.locate(indices)
            earlier = torch.from_numpy(begin + 8 <= row)  # the forecast is made before that row
            assert torch.equal(one["window"][earlier, :8], other["window"][earlier, :8])
            if row >= 70:  # outside of the training part: no statistic knows of it
                for key in ("mean", "std", "scale"):
                    assert torch.equal(one[key], other[key])


def test_statistics_are_those_of_the_training_part(tmp_path):
    table = frame()
    write(table, tmp_path / "a.csv")
    mean, std, scale = series_of(tmp_path, "data.season=6").statistics.values()
    part = table[["a", "b"]].to_numpy(np.float32)[:70].astype(float)
    assert np.allclose(mean[0], part.mean(0))
    assert np.allclose(std[0], part.std(0))
    assert np.allclose(scale[0], np.abs(part[6:] - part[:-6]).mean(0))


@pytest.mark.parametrize("place", ["auto", "device", "host"])
def test_windows_are_slices(tmp_path, place):
    tables = [frame(100), frame(60)]
    for number, table in enumerate(tables):
        write(table, tmp_path / f"{number}.csv")
    windows = windows_of(tmp_path, "train", f"data.place={place}", "data.cache=none")
    first = len(windows) - 49 if len(windows) > 49 else 0
    indices = np.random.default_rng(0).permutation(len(windows))
    batch = windows.batch(indices, CPU)
    which, number, _ = windows.locate(indices)
    for row, (series, start) in enumerate(zip(which, number, strict=True)):
        rows = tables[series].iloc[start : start + 12]
        assert np.allclose(batch["window"][row], rows[["a", "b"]], rtol=1e-6)
        assert batch["when"][row] == rows["date"].iloc[8].timestamp()
        name = windows.id(indices[row])
        assert name == f"{series}@{rows['date'].iloc[7].isoformat()}"
    assert first >= 0
    assert torch.equal(batch["index"], torch.from_numpy(indices))


def test_the_future_begins_where_the_data_end(tmp_path):
    write(frame(100), tmp_path / "a.csv")
    windows = windows_of(tmp_path, "future")
    batch = windows.batch([0], CPU)
    assert np.allclose(batch["window"][0, :8], frame(100)[["a", "b"]].tail(8), rtol=1e-6)
    assert batch["window"][0, 8:].eq(0).all()


def test_what_is_known_of_the_future_is_there(tmp_path):
    table = frame(104, known=np.arange(104.0))
    table.loc[100:, ["a", "b"]] = np.nan
    write(table, tmp_path / "a.csv")
    windows = windows_of(tmp_path, "future", "data.known=[known]")
    batch = windows.batch([0], CPU)
    assert batch["window"][0, 8:, 2].tolist() == [100, 101, 102, 103]
    assert batch["window"][0, 8:, :2].eq(0).all()
    test = windows_of(tmp_path, "test", "data.known=[known]")
    assert test.batch([len(test) - 1], CPU)["window"][0, -1, 2] == 99


def test_files_are_read_once_until_they_change(tmp_path, monkeypatch):
    read = []
    original = files.SeriesFiles.read
    monkeypatch.setattr(
        files.SeriesFiles,
        "read",
        lambda self, index: read.append(self.id(index)) or original(self, index),
    )
    for name in "abc":
        write(frame(), tmp_path / "set" / f"{name}.csv")
    kept = f"data.cache_dir={tmp_path / 'kept'}"
    first = series_of(tmp_path / "set", kept)
    assert set(read) == {"a", "b", "c"}
    read.clear()
    again = series_of(tmp_path / "set", kept)
    assert read == []
    assert torch.equal(first.table.values, again.table.values)
    write(frame(120), tmp_path / "set" / "b.csv")
    changed = series_of(tmp_path / "set", kept)
    assert set(read) == {"b"}
    assert [len(changed.table.values), *changed.table.begins] == [320, 0, 100, 220]


def test_what_was_read_before_an_interruption_is_kept(tmp_path, monkeypatch):
    read = []
    original = files.SeriesFiles.read

    def interrupted(self, index):
        if self.id(index) == "c" and "c" not in read:
            read.append("c")
            raise KeyboardInterrupt
        read.append(self.id(index))
        return original(self, index)

    monkeypatch.setattr(files.SeriesFiles, "read", interrupted)
    monkeypatch.setattr("segfit.data.cache._PROBES", 0)
    monkeypatch.setattr("segfit.data.cache._BATCH", 1)
    for name in "abc":
        write(frame(), tmp_path / "set" / f"{name}.csv")
    kept = f"data.cache_dir={tmp_path / 'kept'}"
    with pytest.raises(KeyboardInterrupt):
        series_of(tmp_path / "set", kept)
    read.clear()
    read.append("c")
    series_of(tmp_path / "set", kept)
    assert read == ["c", "c"]


@pytest.mark.parametrize(
    ("frequency", "start"),
    [
        ("h", "2024-02-28 22:00"),
        ("D", "2024-02-27"),
        ("B", "2024-02-28"),
        ("ME", "2023-11-30"),
        ("MS", "2023-11-01"),
    ],
)
def test_dates_go_on_in_their_step(frequency, start):
    dates = pd.date_range(start, periods=40, freq=frequency).to_numpy("datetime64[s]").astype(int)
    assert following(dates[:30], 10).tolist() == dates[30:].tolist()
