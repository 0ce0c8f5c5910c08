"""What `segfit.load(…).predict` takes of a series, and what a run keeps of its columns."""

import numpy as np
import pandas as pd
import pytest
import torch

from segfit.errors import SegFitError
from segfit.tasks.forecasting.assembly import make_task, recorded_statistics, settle
from segfit.tasks.forecasting.data.files import layout_of
from segfit.tasks.forecasting.evaluation import predict
from tests.unit.tasks.forecasting.data.tables import config_of, frame, write


def test_what_is_known_in_advance_has_to_be_there(tmp_path):
    table = frame(104, known=np.arange(104.0))
    table.loc[100:, ["a", "b"]] = np.nan
    write(table, tmp_path / "a.csv")
    config, samples = config_of(tmp_path, "data.known=[known]"), []
    task = make_task(config, torch.device("cpu"))
    predict(config, task, config, [table], lambda _, given: samples.extend(given))
    window = samples[0]["window"]
    assert np.allclose(window[:8], table[["a", "b", "known"]].to_numpy()[92:100])
    assert window[8:, 2].tolist() == [100, 101, 102, 103]
    table.loc[102, "known"] = np.nan
    with pytest.raises(SegFitError, match=r"input 0: the last 8 \+ 4 rows of a, b, known have"):
        predict(config, task, config, [table], samples.append)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table[::-1], "date does not rise. Sort the rows"),
        (lambda table: table.drop(columns="b"), "there is no column b. It has: date, a"),
        (lambda table: table.assign(b=np.nan), "have to be there. Values are missing in b."),
        (lambda table: table.tail(5), "have to be there. There are 5."),
        (
            lambda table: table.assign(date=pd.date_range("2024-01-01", periods=100, freq="D")),
            "its rows are 1 days apart, those of the run 1 hours",
        ),
        (lambda table: table.set_index("date")[::-1], "date does not rise"),
    ],
)
def test_tables_that_are_not_as_those_of_the_run_are_refused(tmp_path, change, said):
    write(frame(), tmp_path / "a.csv")
    config = config_of(tmp_path)
    task = make_task(config, torch.device("cpu"))
    with pytest.raises(SegFitError) as caught:
        predict(config, task, config, [change(frame())], lambda *_: None)
    assert said in str(caught.value)


def test_a_run_reads_its_columns_in_its_order_whatever_the_files_have(tmp_path):
    write(frame(columns=["b", "a", "c"]), tmp_path / "b.csv")
    config, said = config_of(tmp_path, "data.target=a"), []
    settle(config, {}, said.append)
    before = layout_of(config.data)
    assert (before.columns, before.targets, said) == (("a", "b", "c"), 1, [])
    write(frame(columns=["c", "b", "a"]), tmp_path / "a.csv")
    assert layout_of(config.data) == before
    config.data.root = "gone"
    assert layout_of(config.data) == before


def test_what_series_were_standardised_by_is_checked(tmp_path):
    config = config_of(write(frame(), tmp_path / "a.csv"))
    good = {"a": {"mean": [1.0, 2.0], "std": [1.0, 1.0], "step": 3600}}
    recorded = {"season": 1, "series": good}
    assert recorded_statistics(config, recorded) == recorded
    for wrong in (
        [],
        {"a": {}},
        {"a": {**good["a"], "mean": [1.0]}},
        {"a": {**good["a"], "std": "x"}},
    ):
        with pytest.raises(SegFitError, match="series must hold"):
            recorded_statistics(config, {"season": 1, "series": wrong})
