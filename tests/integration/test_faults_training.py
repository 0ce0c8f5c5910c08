"""Faults of memory, disk and numbers, in real trainings: docs/reliability.md, rows 1, 3 and 6."""

import functools
import resource
import subprocess
import sys
from functools import partial

import pytest
import torch

from segfit.engine import step
from segfit.engine.checkpoint import load_checkpoint
from segfit.models.cnn import CNN
from tests.integration.training import (
    PATIENCE,
    TINY,
    Trained,
    command,
    finished,
    mounting,
    resume,
    same,
    start,
    start_struck,
    the_run,
    train,
    updates_of,
    weights_of,
)

# Batch norm takes its statistics from the images of one pass: without it, pieces give the same as the whole.
EXACT = ("model.dropout=0", "precision=fp32", "augmentation=none", "data.train_size=16")


def run_out(monkeypatch, when, where="forward") -> None:
    """Let passes of more than 2 images fail where `when(update, training)` holds, in the words of cuDNN."""
    make_update, updates, images_of_pass = step.make_update, [0], [0]
    forward, backward = CNN.forward, torch.Tensor.backward

    def counting(state, *args, **options):
        updates[0] = state.progress.update
        return make_update(state, *args, **options)

    def fail_if_large(training):
        if images_of_pass[0] > 2 and when(updates[0], training):
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")

    def failing_forward(self, images):
        images_of_pass[0] = len(images)
        if where == "forward":
            fail_if_large(self.training)
        return forward(self, images)

    def failing_backward(self, *args, **options):
        fail_if_large(training=True)
        backward(self, *args, **options)

    monkeypatch.setattr("segfit.engine.recovery.make_update", counting)
    monkeypatch.setattr(CNN, "forward", failing_forward)
    if where == "backward":
        monkeypatch.setattr(torch.Tensor, "backward", failing_backward)


@pytest.fixture(scope="module")
def untroubled(tmp_path_factory):
    """Return the training of EXACT without batch norm and without a fault, by accumulate; each is made once."""

    @functools.cache
    def trained(accumulate: int) -> Trained:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("segfit.models.cnn.CNN", partial(CNN, norm="none"))
            return train(tmp_path_factory.mktemp("whole"), *EXACT, f"accumulate={accumulate}")

    return trained


@pytest.mark.parametrize(
    ("at", "where", "accumulate"),
    [
        (0, "forward", 1),
        (3, "forward", 1),  # the last of its epoch
        (5, "backward", 1),
        (1, "backward", 2),
        (2, "forward", 2),
    ],
)
def test_memory_that_runs_out_at_any_step_leaves_the_losses_as_they_were(
    tmp_path, monkeypatch, untroubled, at, where, accumulate
):
    whole = untroubled(accumulate)
    monkeypatch.setattr("segfit.models.cnn.CNN", partial(CNN, norm="none"))
    run_out(monkeypatch, lambda update, training: training and update >= at, where)
    tight = train(tmp_path / "tight", *EXACT, f"accumulate={accumulate}")
    assert tight.losses == pytest.approx(whole.losses, rel=1e-4)
    assert tight.heard.steps == whole.heard.steps
    (notice,) = [text for text in tight.notices if "out of memory" in text]
    assert "continuing with 2 and more accumulation; the effective batch stays" in notice
    assert load_checkpoint(tmp_path / "tight/checkpoints/last.pt")["progress"]["micro_batch"] == 2


def test_memory_that_runs_out_in_validation_only_leaves_scores_and_training_as_they_were(
    tmp_path, monkeypatch
):
    whole = train(tmp_path / "whole", *EXACT)
    run_out(monkeypatch, lambda update, training: not training)
    tight = train(tmp_path / "tight", *EXACT)
    assert tight.losses == whole.losses
    assert same(tight.model.state_dict(), whole.model.state_dict())
    assert tight.end.best_scores == pytest.approx(whole.end.best_scores, abs=1e-6)
    assert sum("out of memory in validation" in text for text in tight.notices) == 1
    progress = load_checkpoint(tmp_path / "tight/checkpoints/last.pt")["progress"]
    assert (progress["held_out_batch"], progress["micro_batch"]) == (2, 0)


def test_what_fits_is_remembered_over_a_resume(tmp_path, monkeypatch):
    run_out(monkeypatch, lambda update, training: True)
    train(tmp_path, *EXACT, "max_steps=3")
    again = resume(tmp_path, "max_steps=null")
    assert again.notices == []
    assert again.end.reason == "finished"


def test_a_single_image_that_does_not_fit_ends_with_the_next_lever(tmp_path, monkeypatch):
    forward = CNN.forward

    def failing(self, images):
        if self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, images)

    monkeypatch.setattr(CNN, "forward", failing)
    with pytest.raises(Exception, match=r"micro-batch of a single sample\. Lower image_size"):
        train(tmp_path, *EXACT)


def test_a_poisoned_image_is_named_saved_and_left_out(tmp_path, monkeypatch):
    """A sample of not-a-number, as a broken decoder or a division by zero in somebody's preprocessing gives."""
    from segfit.tasks.segmentation.task import SegmentationTask

    prepare = SegmentationTask.prepare

    def poisoned(self, batch, seed):
        images, targets = prepare(self, batch, seed)
        if (batch["index"] == 5).any():
            images = images * float("nan")
        return images, targets

    monkeypatch.setattr(SegmentationTask, "prepare", poisoned)
    done = train(tmp_path, *EXACT, "report.log_every=3")
    assert done.end.reason == "finished"
    assert all(value.isfinite().all() for value in done.model.state_dict().values())
    out = [text for text in done.notices if "is left out" in text]
    assert len(out) == 2  # once an epoch
    assert len([text for text in done.notices if "going back" in text]) == 2
    saved = sorted((tmp_path / "bad_batches").iterdir())
    assert len(saved) == 2
    for notice, path in zip(out, saved, strict=True):
        (batch,) = torch.load(path, weights_only=True)["batches"]
        assert f"saved as {path}" in notice
        assert "train_0005" in batch["names"]
        assert all(name in notice for name in batch["names"])
        assert 5 in batch["index"].tolist()


# ------------------------------------------------------------------------------------- the disk

LONG = (
    *(text for text in TINY if not text.startswith(("epochs", "data.train_size"))),
    *("epochs=2", "data.train_size=80", "checkpoint.every_steps=5", "precision=fp32"),
)
FULL = "last.pt: File too large. The checkpoint before it is kept."


def end_of(process: "subprocess.Popen[str]") -> "tuple[int, str]":
    output, _ = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in output
    return process.returncode, output


needs_linux = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")


@needs_linux
def test_a_disk_that_is_full_for_a_while_costs_no_training(tmp_path):
    code, output = end_of(start_struck(tmp_path, "12=full", "27=room", *LONG))
    assert code == 0, output
    run = the_run(tmp_path)
    # After the updates 15, 20 and 25, and at the end of the first epoch.
    assert output.count(f"{FULL} Training continues") == 4
    assert updates_of(run) == 40
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("best.pt", "last.pt", "previous.pt")
    ]


@pytest.mark.slow
@needs_linux
def test_a_disk_that_stays_full_ends_cleanly_and_the_run_goes_on_from_what_was_saved(tmp_path):
    code, output = end_of(start_struck(tmp_path, "12=full", *LONG))
    assert code == 2, output
    assert "the training ended (finished), but cannot save" in output
    run = the_run(tmp_path)
    assert updates_of(run) == 10

    code, output = end_of(start(tmp_path, f"resume={run}"))
    assert code == 0, output
    whole = train(tmp_path / "whole", *LONG, base=())
    last = tmp_path / "whole/checkpoints/last.pt"
    assert whole.end.updates == 40
    assert same(weights_of(run / "checkpoints/last.pt"), weights_of(last))


def test_a_disk_that_is_too_small_from_the_start_is_reported(tmp_path):
    """A real file system of 300 KiB, on which nothing but the config finds room."""
    small_disk = mounting("mount -t tmpfs -o size=300k none /mnt")
    done = finished([*small_disk, *command(*TINY, "hydra.run.dir=/mnt/run", "epochs=1")], tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "cannot save /mnt/run/checkpoints/last.pt" in done.stdout
    assert "last.pt: No space left on device. The checkpoint before it is kept" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


KILLED_WHILE_SAVING = """
import os, random, signal, sys, time, pathlib, torch
from segfit.engine.checkpoint import Checkpoints

checkpoints = Checkpoints(pathlib.Path(sys.argv[1]))
content = {"model": {"weight": torch.zeros(1_000_000)}}
known = -1
random.seed(0)
for life in range(25):
    child = os.fork()
    if child == 0:
        number = known
        while True:
            number += 1
            content["model"]["weight"].fill_(number)
            checkpoints.save_last({**content, "number": number})
    time.sleep(random.uniform(0.005, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if checkpoints.exist():
        state, _ = checkpoints.load_last()
        assert state["number"] >= known, (state["number"], known)
        assert (state["model"]["weight"] == state["number"]).all()
        known = state["number"]
print("saved", known)
"""


def test_killed_while_saving_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(KILLED_WHILE_SAVING)
    done = finished([sys.executable, str(script), str(tmp_path / "checkpoints")], tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0
