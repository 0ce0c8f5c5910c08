"""What torch.compile is tried on is what an update runs: nothing compiles again."""

from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from segfit.assembly.training import make_training
from segfit.engine.step import make_update
from segfit.tuning.measure import first_window
from tests.integration.training import TINY, compose_run

RESTORATION = (
    *(
        "task=restoration",
        "model=cnn",
        "model.base_channels=8",
        "model.num_blocks=1",
        "patch_size=32",
    ),
    *("data=shapes", "data.train_size=8", "data.val_size=1", "batch_size=4", "loader.workers=0"),
)


@pytest.mark.parametrize("base", [TINY, RESTORATION], ids=["segmentation", "restoration"])
def test_an_update_runs_the_graph_of_the_trial(base, monkeypatch, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    options = ("compile=true", "device=cpu", "precision=fp32")
    fit = make_training(compose_run(*options, base=base), tmp_path, lambda _: None).fit
    tried = counters["stats"]["unique_graphs"]
    assert tried >= 1
    fit.state.model.train()
    for seed in range(2):
        make_update(fit.state, fit.task, first_window(fit), [seed], 1.0)
    assert counters["stats"]["unique_graphs"] == tried
    torch._dynamo.reset()
