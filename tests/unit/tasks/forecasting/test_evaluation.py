"""What `segfit.load(…).predict` takes of a series."""

import numpy as np
import pytest
import torch

from segfit.errors import SegFitError
from segfit.tasks.forecasting.assembly import make_task
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
