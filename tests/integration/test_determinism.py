"""One seed, one result; and what is missing is named, not waited for."""

import json

import pytest
import torch

from segfit.errors import SegFitError
from tests.integration.training import (
    TINY,
    compose_run,
    same,
    the_run,
    train,
    train_by_command_line,
)

RANDOM = (
    *("augmentation=cpu", "augmentation.mixup=0.5", "model.dropout=0.3", "ema_decay=0.9"),
    "precision=fp32",
)


@pytest.mark.parametrize("augmentation", ["cpu", "kornia-gpu"])
def test_one_seed_gives_the_same_weights_and_scores_bit_for_bit(tmp_path, augmentation):
    options = (*RANDOM, f"augmentation={augmentation}")
    a = train(tmp_path / "a", *options, "seed=1")
    torch.manual_seed(1234)  # what ran before in this process does not matter
    b = train(tmp_path / "b", *options, "seed=1", "loader.workers=1")
    assert a.losses == b.losses
    assert a.end.best_scores == b.end.best_scores
    assert same(a.model.state_dict(), b.model.state_dict())

    other = train(tmp_path / "c", *options, "seed=2", "max_steps=1")
    assert other.losses[0] != a.losses[0]


def test_what_is_logged_and_how_often_changes_nothing(tmp_path):
    a = train(tmp_path / "a", *RANDOM)
    b = train(
        tmp_path / "b", *RANDOM, "report.log_every=5", "report.panels=0", "checkpoint.every_steps=1"
    )
    assert same(a.model.state_dict(), b.model.state_dict())


@pytest.mark.slow
def test_two_processes_with_one_seed_agree(tmp_path):
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        code, output = train_by_command_line(tmp_path / name, *TINY, *RANDOM, "epochs=1")
        assert code == 0, output
        metrics = json.loads((the_run(tmp_path / name) / "metrics.json").read_text())
        found.append((metrics["best"], metrics["last"], metrics["updates"]))
    assert found[0] == found[1]
    assert found[0][2] == 6


@pytest.fixture
def _offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


SEGFORMER = tuple(text for text in TINY if not text.startswith("model"))


@pytest.mark.usefixtures("_offline")
def test_pretrained_weights_that_cannot_be_had_are_reported_and_done_without(tmp_path):
    trained = train(tmp_path, "model=segformer_b0", "max_steps=1", base=SEGFORMER)
    if "random" not in trained.training.facts["weights"]:
        pytest.skip("this machine has the weights in its cache")
    assert any("random" in notice for notice in trained.notices)
    assert trained.heard.steps == [1]


@pytest.mark.usefixtures("_offline")
@pytest.mark.parametrize("weights", ["nvidia/does-not-exist", "/no/such/folder"])
def test_weights_that_were_named_must_load(tmp_path, weights):
    with pytest.raises(SegFitError, match=weights):
        train(tmp_path, "model=segformer_b0", f"model.weights={weights}", base=SEGFORMER)


def test_all_wrong_values_are_reported_at_once():
    with pytest.raises(SegFitError) as error:
        compose_run("batch_size=0", "lr=-1", "image_size=8", "loss.class_weights=[1,2]")
    text = str(error.value)
    assert all(key in text for key in ("batch_size=0", "lr=-1"))
