"""A run that was killed, stopped or interrupted goes on as if it had never been."""

import json
import re
import shutil
import signal
from itertools import chain
from pathlib import Path

import pytest
import torch
import yaml

from segfit.commands import train as training
from segfit.data.batches import TrainBatches
from segfit.engine.checkpoint import load_checkpoint
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from tests.integration.training import (
    PATIENCE,
    TINY,
    Trained,
    compose_run,
    one_thread,
    resume,
    same,
    start_struck,
    the_run,
    train,
    train_by_command_line,
    updates_of,
    weights_of,
)

# Everything random at once: order, augmentation in two workers, MixUp, dropout; and an average of the weights.
RANDOM = (
    *(text for text in TINY if not text.startswith("loader.workers")),
    *("loader.workers=2", "augmentation=cpu", "augmentation.mixup=0.5", "model.dropout=0.3"),
    *(
        "ema_decay=0.9",
        "scheduler=cosine",
        "checkpoint.every_steps=2",
        "epochs=4",
        "precision=fp32",
    ),
)


def losses(run: Path) -> dict[int, str]:
    """Return update → what train.log says of it, the last line where there are two."""
    lines = (run / "train.log").read_text().splitlines()
    found = [re.search(r"update (\d+)/\d+ (loss \S+ lr \S+ grad \S+)", line) for line in lines]
    return {int(match[1]): match[2] for match in found if match}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    code, output = train_by_command_line(folder, *RANDOM)
    assert code == 0, output
    return the_run(folder)


def assert_equal(run: Path, unbroken: Path) -> None:
    assert losses(run) == losses(unbroken)
    for key in ("model", "ema"):
        assert same(
            weights_of(run / "checkpoints/last.pt", key),
            weights_of(unbroken / "checkpoints/last.pt", key),
        )
    assert same(
        weights_of(run / "checkpoints/best.pt"), weights_of(unbroken / "checkpoints/best.pt")
    )


def test_whatever_ends_it_it_ends_as_if_nothing_had_been(tmp_path, unbroken):
    """Killed, hung up with nobody reading, damaged on the disk, interrupted: by the real command line, one run."""
    process = start_struck(tmp_path, "9=SIGKILL", *RANDOM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, output
    run = the_run(tmp_path)
    assert updates_of(run) == 8  # checkpoint.every_steps=2
    assert not (run / "metrics.json").exists()

    process = start_struck(tmp_path, "15=SIGHUP", f"resume={run}")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # as `| head -1` does, and a terminal that is closed
    assert process.wait(timeout=PATIENCE) == 0
    assert updates_of(run) == max(losses(run)) == 15

    flip_a_bit(run / "checkpoints/last.pt")
    process = start_struck(tmp_path, "20=SIGINT", f"resume={run}")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "last.pt: damaged" in output
    assert "Resuming from the one before it, previous.pt" in output
    assert "resuming at update 14" in output
    assert "Traceback" not in output
    assert updates_of(run) == 20

    code, output = train_by_command_line(tmp_path, f"resume={run}")
    assert code == 0, output
    assert "resuming at update 20" in output
    assert_equal(run, unbroken)
    assert the_run(tmp_path) == run  # no second folder was made


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.mark.slow
def test_sigterm_saves_and_ends_well_and_the_run_goes_on(tmp_path, unbroken):
    process = start_struck(tmp_path, "9=SIGTERM", *RANDOM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    run = the_run(tmp_path)
    assert updates_of(run) == max(losses(run)) == 9
    code, output = train_by_command_line(tmp_path, f"resume={run}")
    assert code == 0, output
    assert "resuming at update 9" in output
    assert_equal(run, unbroken)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trained:
    """A run of TINY that is over; its folder is to be copied."""
    return train(tmp_path_factory.mktemp("whole"))


def test_a_run_that_is_over_says_so_and_goes_on_with_more_epochs(tmp_path, whole):
    run = shutil.copytree(whole.run, tmp_path / "run")
    with pytest.raises(
        SegFitError, match=r"run is over.*epochs=2 is reached\. To continue, raise epochs"
    ):
        resume(run)
    longer = resume(run, "epochs=3")
    assert longer.heard.steps == list(range(13, 19))
    assert longer.end.reason == "finished"


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_over(tmp_path, whole):
    run = shutil.copytree(whole.run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    again = resume(run)
    assert any("nothing was saved yet" in notice for notice in again.notices)
    assert again.losses == whole.losses


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    train(tmp_path / "small", "max_steps=1")
    train(tmp_path / "large", "max_steps=1", "model.base_channels=12", "lr=0.5")
    last = tmp_path / "small/checkpoints/last.pt"
    last.write_bytes((tmp_path / "large/checkpoints/last.pt").read_bytes())
    with pytest.raises(SegFitError) as refused:
        resume(tmp_path / "small", "max_steps=2")
    text = str(refused.value)
    assert "config.yaml: model.base_channels is 8, but the run was trained with 12" in text
    assert "lr is" in text
    assert "trained with 0.5" in text


MEDDLED = {
    "a weight less": lambda content: content["model"].popitem(),
    "update in words": lambda content: content["progress"].update(update="two"),
    "images before the first": lambda content: content["progress"].update(image=-4),
    "a sum of text": lambda content: content["progress"].update(loss_sum="1"),
    "scores that are none": lambda content: content["progress"].update(best_scores=[1]),
    "a position that is none": lambda content: content["progress"].update(left_out=[3]),
    "progress less": lambda content: content.pop("progress"),
    "another optimizer": lambda content: content.update(optimizer={"state": 1}),
    "no random numbers": lambda content: content.update(random=[{}]),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A run of one update, to be copied."""
    return train(tmp_path_factory.mktemp("begun"), "max_steps=1").run


@pytest.mark.parametrize("how", MEDDLED)
def test_a_checkpoint_that_somebody_meddled_with_is_refused(tmp_path, begun, how):
    run = shutil.copytree(begun, tmp_path / "run")
    change(run, MEDDLED[how])
    with pytest.raises(SegFitError, match=r"last\.pt does not fit the run's config\.yaml"):
        resume(run, "max_steps=2")


def test_a_config_that_was_edited_meanwhile_is_refused(tmp_path, begun):
    run = shutil.copytree(begun, tmp_path / "run")
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("hflip: 0.5", "hflip: 0.25"))
    with pytest.raises(SegFitError, match=r"augmentation\.hflip is 0\.25.* trained with 0\.5"):
        resume(run, "max_steps=2")


def change(run: Path, how) -> None:
    """Change what a run's last checkpoint says."""
    last = run / "checkpoints/last.pt"
    content = load_checkpoint(last)
    how(content)
    torch.save(content, last)


def images_of(monkeypatch) -> list[list[int]]:
    """Return a list that grows by the images of each training batch."""
    seen: list[list[int]] = []
    epoch = TrainBatches.epoch

    def watched(self, *where):
        for batch in epoch(self, *where):
            seen.append(batch["index"].tolist())
            yield batch

    monkeypatch.setattr(TrainBatches, "epoch", watched)
    return seen


@pytest.fixture(scope="module")
def cut_in_its_epoch(tmp_path_factory) -> "tuple[Path, list[int], list[int]]":
    """Return a run that was cut after two updates, the images that it has seen, and those of a whole epoch, in order."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        for steps in (None, 2):
            images = images_of(patch)
            cut = train(tmp_path_factory.mktemp("cut"), "epochs=1", f"max_steps={steps or 'null'}")
            seen.append(list(chain(*images)))
            patch.undo()
    return cut.run, seen[1], seen[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ("batch_size=2", "accumulate=2"),
            "other micro-batches (batch_size was 4, is 2) of the same",
        ),
        (("batch_size=2",), "another effective batch (batch_size was 4, is 2; samples_per_update"),
        (("batch_size=8",), "another effective batch (batch_size was 4, is 8; samples_per_update"),
        (("accumulate=2",), "another effective batch (samples_per_update was 4, is 8)"),
    ],
)
def test_with_another_batch_size_every_image_of_the_epoch_is_seen_once(
    tmp_path, monkeypatch, cut_in_its_epoch, changes, message
):
    cut, begun, order = cut_in_its_epoch
    run, rest = shutil.copytree(cut, tmp_path / "run"), images_of(monkeypatch)
    again = resume(run, "max_steps=null", *changes)
    assert begun + list(chain(*rest)) == order
    assert any(message in notice for notice in again.notices), again.notices
    assert again.end.reason == "finished"


def test_the_learning_rate_goes_on_from_the_same_share_of_the_training(tmp_path):
    options = ("scheduler=cosine", "scheduler.warmup=0", "lr=0.01", "epochs=4")
    whole = train(tmp_path / "whole", *options)
    train(tmp_path / "cut", *options, "max_steps=12")  # half of 24 updates
    rest = resume(tmp_path / "cut", "max_steps=null", "batch_size=8")
    rates = [log.lr for log in whole.heard.logs]
    assert rest.heard.steps == list(range(13, 19))  # 6 of twice the size
    assert [log.lr for log in rest.heard.logs] == pytest.approx(rates[13::2], rel=1e-6)
    assert rest.heard.infos[0].total_updates == 18


def test_elsewhere_it_goes_on_and_says_that_it_is_not_bit_for_bit(tmp_path):
    train(tmp_path, "max_steps=7")

    def move(content):
        content["about"] |= {"torch": "2.6.0", "device": "NVIDIA GeForce RTX 3050"}
        content["progress"]["micro_batch"] = 1  # what fitted there says nothing here

    change(tmp_path, move)
    again = resume(tmp_path, "max_steps=null")
    (line,) = [notice for notice in again.notices if "not bit for bit" in notice]
    assert "device was NVIDIA GeForce RTX 3050, is CPU" in line
    assert f"torch was 2.6.0, is {torch.__version__}" in line
    assert again.training.fit.state.progress.micro_batch == 0


def test_other_worker_counts_change_nothing_and_say_nothing(tmp_path, whole):
    train(tmp_path / "cut", "max_steps=8")
    again = resume(tmp_path / "cut", "max_steps=null", "loader.workers=2", "loader.prefetch=1")
    assert same(again.model.state_dict(), whole.model.state_dict())
    assert again.notices == []


def test_a_damaged_checkpoint_of_the_last_validation_falls_back_to_before_it(tmp_path):
    whole = train(tmp_path, *RANDOM, "loader.workers=0")
    best = weights_of(tmp_path / "checkpoints/best.pt")
    before = load_checkpoint(tmp_path / "checkpoints/previous.pt")["progress"]
    assert before["epoch"] == 3  # its validation was still to come
    flip_a_bit(tmp_path / "checkpoints/last.pt")
    again = resume(tmp_path)
    assert any("Resuming from the one before it, previous.pt" in notice for notice in again.notices)
    assert again.end.best_scores == whole.end.best_scores
    assert same(again.model.state_dict(), whole.model.state_dict())
    assert same(weights_of(tmp_path / "checkpoints/best.pt"), best)


def test_killed_after_its_last_save_it_writes_what_is_missing(tmp_path):
    with one_thread():
        training.train(compose_run(), [], tmp_path)
    written = json.loads((tmp_path / "metrics.json").read_text())
    (tmp_path / "metrics.json").unlink()
    with one_thread():
        training.train(
            runs.resumed_config(tmp_path, [f"resume={tmp_path}"]), [], tmp_path, resumed=True
        )
    assert "this run is over" in (tmp_path / "train.log").read_text()
    again = json.loads((tmp_path / "metrics.json").read_text())
    for key in ("status", "best", "best_epoch", "updates"):
        assert again[key] == written[key]
    shorter = runs.resumed_config(tmp_path, [f"resume={tmp_path}", "epochs=1"])
    with pytest.raises(SegFitError, match="nothing is left to train"), one_thread():
        training.train(shorter, [], tmp_path, resumed=True)
    assert runs.load_config(tmp_path).epochs == 2  # what is refused leaves the run as it is


def test_where_no_checkpoint_is_whole_it_ends_with_one_message(tmp_path):
    train(tmp_path, "max_steps=2")
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(SegFitError, match=r"previous\.pt: not a readable checkpoint") as error:
        resume(tmp_path, "max_steps=3")
    assert len(error.value.problems) == 1


def test_a_resume_may_not_change_the_run(tmp_path):
    """By the real command line, of which nothing is left in the run."""
    run = tmp_path / "run"
    train(run, "max_steps=1")
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, output = train_by_command_line(tmp_path, f"resume={run}", "lr=1", "model=cnn", "epochs=9")
    assert code == 2
    assert "lr=1: cannot change when a run is resumed" in output
    assert "model=cnn: cannot change when a run is resumed" in output
    assert "epochs=9:" not in output
    assert "Traceback" not in output
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    assert yaml.safe_load((run / "config.yaml").read_text())["epochs"] == 2
