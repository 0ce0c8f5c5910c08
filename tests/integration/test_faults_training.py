"""Faults of memory, disk and numbers, in real trainings: docs/reliability.md, rows 1, 3 and 6."""

import resource
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from segfit.engine import step
from segfit.engine.checkpoint import load_checkpoint
from segfit.models.cnn import CNN
from tests.integration.training import (
    ROOT,
    TINY,
    command,
    environment,
    resume,
    same,
    start,
    the_run,
    train,
    weights_of,
)

# Batch norm takes its statistics from the images of one pass: without it, pieces give the same as the whole.
EXACT = ("model.dropout=0", "precision=fp32", "augmentation=none", "data.train_size=16")


@pytest.fixture
def without_batch_norm(monkeypatch):
    monkeypatch.setattr("segfit.models.cnn.CNN", partial(CNN, norm="none"))


def run_out(monkeypatch, when) -> None:
    """Let passes of more than 2 images fail where `when(update, training)` holds, in the words of cuDNN."""
    make_update, updates = step.make_update, [0]

    def counting(state, *args, **options):
        updates[0] = state.progress.update
        return make_update(state, *args, **options)

    monkeypatch.setattr("segfit.engine.updating.make_update", counting)
    forward = CNN.forward

    def failing(self, images):
        if len(images) > 2 and when(updates[0], self.training):
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        return forward(self, images)

    monkeypatch.setattr(CNN, "forward", failing)


@pytest.mark.parametrize("at", [0, 3, 5])
def test_memory_that_runs_out_at_any_step_leaves_the_losses_as_they_were(
    tmp_path, monkeypatch, without_batch_norm, at
):
    whole = train(tmp_path / "whole", *EXACT)
    run_out(monkeypatch, lambda update, training: training and update >= at)
    tight = train(tmp_path / "tight", *EXACT)
    assert tight.losses == pytest.approx(whole.losses, rel=1e-4)
    assert tight.heard.steps == whole.heard.steps
    (told,) = [text for text in tight.notices if "out of memory" in text]
    assert "going on with 2 and more accumulation; the effective batch stays" in told
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
    with pytest.raises(Exception, match=r"micro-batch of a single image\. Lower image_size"):
        train(tmp_path, *EXACT)


def test_a_poisoned_image_is_named_saved_and_left_out(tmp_path, monkeypatch):
    """A sample of not-a-number, as a broken decoder or a division by zero in somebody's preprocessing gives."""
    from segfit.tasks.segmentation import SegmentationTask

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
    assert all("00005" in text or "train_5" in text or "/5" in text for text in out), out
    saved = sorted((tmp_path / "bad_batches").iterdir())
    assert len(saved) == 2
    assert 5 in torch.load(saved[0], weights_only=True)["batches"][0]["index"].tolist()


# ------------------------------------------------------------------------------------- the disk

LONG = (
    *(text for text in TINY if not text.startswith(("epochs", "data.train_size"))),
    *("epochs=3", "data.train_size=200", "checkpoint.every_steps=5", "precision=fp32"),
)


def wait_for_line(process: "subprocess.Popen[str]", folder: Path, text: str) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(text in log.read_text() for log in folder.glob("outputs/*/*/train.log")):
            return
        time.sleep(0.01)
    raise AssertionError(f"never told {text!r}: {process.communicate()[0]}")


def limit_files(process: "subprocess.Popen[str]", size: int) -> None:
    """Let no file of a process grow beyond `size`: writing fails in the kernel as on a full disk."""
    hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_is_full_for_a_while_costs_no_training(tmp_path):
    process = start(tmp_path, *LONG)
    wait_for_line(process, tmp_path, "update 12/")
    limit_files(process, 20_000)
    wait_for_line(process, tmp_path, "cannot save")
    run = the_run(tmp_path)
    kept = load_checkpoint(run / "checkpoints/last.pt")["progress"]["update"]
    assert kept >= 5
    limit_files(process, resource.RLIM_INFINITY)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert "last.pt: File too large. The checkpoint before it is kept. Training goes on" in output
    assert load_checkpoint(run / "checkpoints/last.pt")["progress"]["update"] == 150
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("best.pt", "last.pt", "previous.pt")
    ]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_stays_full_ends_cleanly_and_the_run_goes_on_from_what_was_saved(tmp_path):
    process = start(tmp_path, *LONG)
    wait_for_line(process, tmp_path, "update 12/")
    limit_files(process, 20_000)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert "the training ended (finished), but cannot save" in output
    run = the_run(tmp_path)
    kept = load_checkpoint(run / "checkpoints/last.pt")["progress"]["update"]
    assert 5 <= kept < 150

    again = subprocess.run(
        command(f"resume={run}"), cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    unbroken = tmp_path / "unbroken"
    whole = train_alone(unbroken)
    assert same(weights_of(run / "checkpoints/last.pt"), weights_of(whole / "checkpoints/last.pt"))


def train_alone(folder: Path) -> Path:
    folder.mkdir()
    process = start(folder, *LONG)
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return the_run(folder)


def _can_mount() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    mount = [unshare, "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    return subprocess.run(mount, capture_output=True).returncode == 0


@pytest.mark.skipif(not _can_mount(), reason="may not mount a small disk")
def test_a_disk_that_is_too_small_from_the_start_is_told(tmp_path):
    """A real file system of 300 KiB, on which nothing but the config finds room."""
    inner = " ".join(f"'{part}'" for part in command(*TINY, "hydra.run.dir=/mnt/run", "epochs=1"))
    script = f"mount -t tmpfs -o size=300k none /mnt && {inner}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
    )
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
        state, told = checkpoints.load_last()
        assert state["number"] >= known, (state["number"], known)
        assert (state["model"]["weight"] == state["number"]).all()
        known = state["number"]
print("saved", known)
"""


def test_killed_while_saving_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 0
