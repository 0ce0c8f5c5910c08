"""What evaluate.py refuses: wrong input, and untrusted run folders."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from segfit.commands import train as training
from segfit.errors import SegFitError
from tests.integration.evaluating import evaluate, write_data
from tests.integration.training import command, compose_run, finished, one_thread
from tests.unit.payload import Payload


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Train a run at place/"run 1" on place/data, in this process."""
    place = tmp_path_factory.mktemp("refused")
    write_data(place / "data")
    overrides = (
        *("model=cnn", "model.base_channels=8", "image_size=64", "batch_size=2", "epochs=1"),
        *("data=folder", f"data.root={place / 'data'}", "data.num_classes=3", "device=cpu"),
        *("loss.class_weights=balanced", "report.logger=[]", "loader.workers=0"),
    )
    with one_thread():
        training.train(compose_run(*overrides, base=()), overrides, place / "run 1")
    return place


@pytest.fixture
def untrusted(place, tmp_path) -> Path:
    """Return a copy of the run, to spoil."""
    return shutil.copytree(
        place / "run 1", tmp_path / "run", ignore=shutil.ignore_patterns("evaluation")
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": "nowhere"}, "nowhere: no run folder"),
        ({"split": "test"}, "split=test: the run's data have no such split. There are: train, val"),
        ({"split": "vall"}, "split=vall: must be one of train, val, test. Did you mean 'val'"),
        ({"overlap": 1.0}, "overlap=1.0: must be less than 1"),
        ({"root": "nowhere"}, "root=…"),
        ({"images": "{place}/nowhere"}, "no such file or folder"),
        ({"images": "{place}/data/train/masks/../nothing"}, "no such file or folder"),
        ({"images": "{place}/run 1/checkpoints"}, "no image in it"),
        (
            {"images": "{place}/data/val/images", "out": "{place}/data/val/images/out"},
            "is inside images=",
        ),
        ({"out": "{place}/data/val"}, "masks in it would be replaced"),
        ({"out": "{place}/run 1"}, "metrics.json in it would be replaced"),
        ({"out": "{place}/run 1/config.yaml"}, "cannot be made"),
    ],
)
def test_wrong_input_is_reported(place, values, message):
    values = {
        key: text.format(place=place) if isinstance(text, str) else text
        for key, text in values.items()
    }
    before = sorted(place.rglob("*"))
    with pytest.raises(SegFitError) as error:
        evaluate(place, **values)
    assert message in str(error.value)
    assert sorted(place.rglob("*")) == before


def test_all_that_is_wrong_with_a_command_line_is_reported_at_once(place):
    line = command("run='run 1'", "splt=val", "overlap=1", "precision=fp17", script="evaluate.py")
    done = finished(line, place)
    assert done.returncode == 2
    for message in ("Did you mean 'split'", "overlap", "Did you mean 'fp16'"):
        assert message in done.stderr
    assert "Traceback" not in done.stderr


def edit_config(change):
    def spoil(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        change(config)
        (run / "config.yaml").write_text(yaml.safe_dump(config))

    return spoil


def edit_weights(change):
    def spoil(run: Path) -> None:
        content = torch.load(run / "checkpoints/best.pt", weights_only=True)
        change(content["model"])
        torch.save(content, run / "checkpoints/best.pt")

    return spoil


def hub_encoder(config) -> None:
    config["model"] = {"name": "timm_unet", "encoder": "hf-hub:somebody/model", "weights": None}


SPOILED = {
    "interpolation": edit_config(lambda c: c["data"].update(root="${oc.env:HOME}")),
    "unknown key": edit_config(lambda c: c.update(evil=1)),
    "a class to make": edit_config(lambda c: c["model"].update(_target_="os.system")),
    "wrong type": edit_config(lambda c: c.update(lr="fast")),
    "out of range": edit_config(lambda c: c.update(batch_size=0)),
    "group of another kind": edit_config(lambda c: c.update(model=["cnn"])),
    "model from somebody's hub": edit_config(hub_encoder),
    "another model": edit_config(lambda c: c["model"].update(base_channels=12)),
    "no mapping": lambda run: (run / "config.yaml").write_text("- 1\n"),
    "weights that are no tensors": edit_weights(lambda m: m.update(x="y")),
    "a weight too many": edit_weights(lambda m: m.update(x=torch.zeros(1))),
    "a weight too few": edit_weights(lambda m: m.pop(next(iter(m)))),
    "a pickle inside a checkpoint": edit_weights(lambda m: m.update(x=Payload(Path("executed")))),
    "no checkpoint": lambda run: (run / "checkpoints/best.pt").unlink(),
    "half a checkpoint": lambda run: os.truncate(run / "checkpoints/best.pt", 1000),
    "metrics too deep": lambda run: (run / "metrics.json").write_text("[" * 100_000),
    "metrics of another kind": lambda run: (run / "metrics.json").write_text("[]"),
    "no temperature": lambda run: (run / "temperature.json").write_text('{"temperature": null}'),
    "impossible class weights": lambda run: (run / "metrics.json").write_text(
        '{"class_weights": [1, NaN, 1]}'
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_run_is_refused(place, untrusted, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SPOILED[name](untrusted)
    with pytest.raises(SegFitError):
        evaluate(place, run=str(untrusted))
    assert not Path("executed").exists()
    assert not list(untrusted.rglob("masks"))
