"""What `segfit.load(…).predict` takes of a series, and what a run keeps of its columns."""

import numpy as np
import pandas as pd
import pytest
import torch

from segfit.errors import SegFitError
from segfit.tasks.forecasting.assembly import make_task, settle
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
        (lambda table: table.assign(b=np.nan), "have to be there; 100 are, with gaps in: b."),
        (lambda table: table.tail(5), "have to be there; 5 are, with gaps in: none."),
        (
            lambda table: table.assign(date=pd.date_range("2024-01-01", periods=100, freq="D")),
            "a row every 86400 seconds, but the run has one every 3600",
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


def test_a_run_that_starts_from_another_reads_its_columns_in_the_order_of_the_weights(tmp_path):
    earlier = {"data.name": "csv", "data.columns": ["b", "a", "c"], "data.target": ["b"]}
    write(frame(columns=["c", "a", "b"]), tmp_path / "a.csv")
    config = config_of(tmp_path, "data.target=b")
    settle(config, earlier, lambda _: None)
    assert layout_of(config.data).columns == ("b", "a", "c")
    for other in ({"data.name": "waves", "data.columns": 3}, {**earlier, "data.target": ["a"]}):
        config = config_of(tmp_path, "data.target=b")
        settle(config, other, lambda _: None)
        assert layout_of(config.data).columns == ("b", "c", "a")
