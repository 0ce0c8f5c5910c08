"""A sweep: every job a run of its own, a leader board, and failures that stay their own."""

import csv
import os
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from segfit.runs import folder as runs
from tests.integration.training import PATIENCE, TINY, start, train_by_command_line, wait_for

SMALL = tuple(text for text in TINY if not text.startswith(("batch_size", "epochs")))


def sweep_of(folder: Path) -> Path:
    (overrides,) = folder.glob("multirun/*/*/0/overrides.yaml")
    return overrides.parents[1]


def rows(sweep: Path) -> dict[str, dict[str, str]]:
    with (sweep / "leaderboard.csv").open(newline="") as file:
        return {row["job"]: row for row in csv.DictReader(file)}


REAL = {"PYTHONUNBUFFERED": "1"}  # jobs that are children of the sweep


def training_child(process: "subprocess.Popen[str]", folder: Path, job: int) -> psutil.Process:
    """Wait until a job of the sweep trains; return its process."""
    wait_for(process, folder, "update 2/", f"multirun/*/*/{job}/train.log")
    (child,) = psutil.Process(process.pid).children()
    return child


@pytest.mark.slow
def test_a_killed_job_is_reported_and_the_next_one_runs(tmp_path):
    process = start(tmp_path, "-m", *SMALL, "batch_size=4", "epochs=1,500", **REAL)
    training_child(process, tmp_path, 1).kill()
    output, _ = process.communicate(timeout=PATIENCE)
    board = rows(sweep_of(tmp_path))
    assert process.returncode == 1, output
    assert board["0"]["status"] == "finished"
    assert board["1"]["status"] == "crash"
    assert "killed by signal 9" in board["1"]["message"]
    assert "killed by signal 9" in output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_sweep_that_is_stopped_saves_its_job_and_starts_no_other(tmp_path, number, code):
    process = start(tmp_path, "-m", *SMALL, "batch_size=4", "epochs=500,1", **REAL)
    child = training_child(process, tmp_path, 0)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)  # as `kill` does
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    assert not child.is_running()
    assert "Traceback" not in output
    sweep = sweep_of(tmp_path)
    assert (sweep / "0/checkpoints/last.pt").exists()
    assert (sweep / "0/metrics.json").exists()
    assert not (sweep / "1").exists()


def sweep_again(folder: Path, **variables: str) -> "tuple[int, str, Path]":
    sweep = sweep_of(folder)
    code, output = train_by_command_line(folder, f"resume_sweep={sweep}", **variables)
    assert "Traceback" not in output
    return code, output, sweep


def test_a_killed_sweep_runs_what_is_missing_and_no_more(tmp_path):
    """Jobs: killed, finished, in the middle when all was killed, not begun and wrong input."""
    sizes = {"0": "3", "1": "2", "2": "4", "3": "-1"}
    small = [text for text in SMALL if not text.startswith(("data.train", "data.val"))]
    data = ("data.train_size=8", "data.val_size=2", "checkpoint.every_steps=2")
    length = ("epochs=30", "val_every=30", "max_steps=60")
    line = (*small, *data, *length, f"batch_size={','.join(sizes.values())}")
    process = start(tmp_path, "-m", *line, KILLED="batch_size=3")
    wait_for(process, tmp_path, "update 5/", "multirun/*/*/2/train.log")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    sweep = sweep_of(tmp_path)
    assert not (sweep / "leaderboard.csv").exists()
    assert not (sweep / "3").exists()
    finished = (sweep / "1/metrics.json").stat().st_mtime_ns

    code, output, _ = sweep_again(tmp_path, KILLED="batch_size=3")
    assert code == 1, output
    assert "job 1: done before" in output
    assert "Leader board" in output
    assert "leaderboard.csv" in output
    board = rows(sweep)
    assert {job: row["batch_size"] for job, row in board.items()} == sizes
    states = [board[job]["status"] for job in "0123"]
    assert states == ["crash", "max_steps", "max_steps", "input"]
    assert "batch_size=-1: must be at least 1" in board["3"]["message"]
    assert "killed by signal 9" in board["0"]["message"]
    assert (sweep / "0-failed-1/error.json").exists()
    assert (sweep / "1/metrics.json").stat().st_mtime_ns == finished
    log = (sweep / "2/train.log").read_text()
    assert "resuming at update" in log
    assert log.count("update 60/") == 1
    assert board["2"]["updates"] == "60"
    for job in "12":
        assert 0 <= float(board[job]["best_miou"]) <= 1
        folder = sweep / job
        for name in ("config.yaml", "overrides.yaml", "metrics.json", "train.log"):
            assert (folder / name).stat().st_size > 0
        for name in ("last.pt", "best.pt"):
            assert (folder / "checkpoints" / name).exists()
        assert list((folder / "tensorboard").glob("events.*"))
        assert runs.load_config(folder).batch_size == int(sizes[job])
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_job_that_outlived_its_sweep_is_not_started_twice(tmp_path):
    process = start(tmp_path, "-m", *SMALL, "batch_size=4,0", "epochs=500", **REAL)
    child = training_child(process, tmp_path, 0)
    process.kill()  # the sweep alone, as a closed session or the kernel does
    process.wait()
    code, output, sweep = sweep_again(tmp_path)
    assert code == 1, output
    assert f"job 0: still trained by process {child.pid} on " in output
    assert child.is_running()
    assert not (sweep / "0/error.json").exists()
    board = rows(sweep)
    assert (board["0"]["status"], board["1"]["status"]) == ("unfinished", "input")
    child.terminate()
    child.wait(PATIENCE)
    assert (sweep / "0/metrics.json").exists()
    process.communicate()


def test_the_same_command_in_its_folder_resumes_a_sweep_and_another_is_refused(tmp_path):
    line = ("-m", *SMALL, "batch_size=0,-1", "hydra.sweep.dir=mine")
    assert train_by_command_line(tmp_path, *line)[0] == 1
    sweep = tmp_path / "mine"
    before = (sweep / "sweep.yaml").stat().st_mtime_ns
    code, output = train_by_command_line(tmp_path, *line)
    assert code == 1, output  # both have wrong input, again
    assert (sweep / "0-failed-1/error.json").exists()
    assert (sweep / "1-failed-1/error.json").exists()

    code, output = train_by_command_line(tmp_path, "resume_sweep=mine", "lr=1")
    assert code == 2
    assert "hydra.sweep.dir=mine holds another sweep" in output
    assert "resume_sweep=mine" in output
    assert "Traceback" not in output
    assert (sweep / "sweep.yaml").stat().st_mtime_ns == before
    (sweep / "sweep.yaml").unlink()  # the jobs themselves refuse
    code, output = train_by_command_line(tmp_path, *line, "lr=1")
    assert code == 2
    assert "mine/0: holds another job" in output


def test_a_hostile_record_launches_nothing(tmp_path):
    marker = tmp_path / "executed"
    evil = tmp_path / "sweep/evil.yaml"
    evil.parent.mkdir()
    evil.write_text(
        f"# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: os.mkdir\n      path: {marker}\n"
    )
    record = {
        "overrides": [f"experiment=../../../../../../../../..{evil.with_suffix('')}", "lr=1,2"],
        "hydra": [],
    }
    (tmp_path / "sweep/sweep.yaml").write_text(yaml.safe_dump(record))
    code, output = train_by_command_line(tmp_path, "resume_sweep=sweep")
    assert code == 2, output
    assert "refused" in output
    assert "Traceback" not in output
    assert not marker.exists()
    # Typed by the person it would do so: the check above is what keeps it out.
    code, output = train_by_command_line(tmp_path, "-m", *record["overrides"])
    assert marker.exists(), output
