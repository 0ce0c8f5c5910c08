"""Sweeps by other engines: several jobs at a time, a scheduler that takes its machine back, a search."""

import math
import os
import shutil
import signal
import sqlite3
import subprocess
from pathlib import Path

import psutil
import pytest
import yaml

from tests.integration.test_sweep import SMALL, rows, sweep_of
from tests.integration.training import (
    PATIENCE,
    start,
    train_by_command_line,
    wait_for,
)

QUICK = (*SMALL, "report.logger=[]", "checkpoint.every_steps=1")
# joblib's workers end with a process that ends as Python does
NOT_FORKED = {"PYTHONUNBUFFERED": "1"}


def wait_for_update(process: "subprocess.Popen[str]", folder: Path, job: int, update: int) -> None:
    wait_for(process, folder, f"update {update}/", f"multirun/*/*/{job}/train.log")


@pytest.mark.slow
def test_joblib_runs_jobs_side_by_side_and_one_that_fails_costs_the_others_nothing(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    line = ("-m", *QUICK, "epochs=1", "batch_size=4,0,2", "hydra/launcher=joblib")
    code, output = train_by_command_line(tmp_path, *line, **NOT_FORKED)
    assert code == 1, output
    assert "Traceback" not in output
    assert "Warning" not in output
    sweep = sweep_of(tmp_path)
    board = rows(sweep)
    assert [board[job]["status"] for job in "012"] == ["finished", "input", "finished"]
    assert "update 1/6" in (sweep / "0/output.log").read_text()
    assert "update 1/6" not in output  # two jobs would write over each other
    assert "batch_size=0: must be at least 1" in (sweep / "1/output.log").read_text()

    shutil.rmtree(sweep / "2")  # as if the sweep had been killed before it
    code, output = train_by_command_line(tmp_path, f"resume_sweep={sweep}", **NOT_FORKED)
    assert code == 1, output
    assert "job 0: done before" in output
    assert [rows(sweep)[job]["status"] for job in "012"] == ["finished", "input", "finished"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_sweep_of_any_launcher_that_is_stopped_saves_its_jobs(tmp_path, launcher, number, code):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    line = ("-m", *QUICK, "epochs=500", "batch_size=4", "lr=0.001,0.002,-1")
    process = start(tmp_path, *line, f"hydra/launcher={launcher}", **NOT_FORKED)
    for job in (0, 1):
        wait_for_update(process, tmp_path, job, 3)
    jobs = psutil.Process(process.pid).children(recursive=True)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, output
    sweep = sweep_of(tmp_path)
    for job in "01":
        assert "training ended after" in (sweep / job / "train.log").read_text()
        assert (sweep / job / "metrics.json").exists()
    assert f"resume_sweep={sweep.relative_to(tmp_path)}" in output
    assert psutil.wait_procs(jobs, timeout=PATIENCE)[1] == []


@pytest.mark.slow
def test_a_job_that_a_scheduler_takes_back_is_queued_again_and_goes_on(tmp_path):
    """SIGUSR2 to every process of the job is what Slurm sends; submitit's local executor queues as it does."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    data = ("batch_size=4", "epochs=15", "val_every=15", "lr=0.001", "loader.workers=1")
    line = [text for text in ("-m", *QUICK, *data) if text != "loader.workers=0"]
    process = start(tmp_path, *line, "hydra/launcher=submitit_local")
    wait_for_update(process, tmp_path, 0, 3)
    controllers = psutil.Process(process.pid).children()
    for controller in controllers:
        if Path(f"/proc/{controller.pid}").exists() and _trains(controller, 0):
            for part in controller.children(recursive=True):
                part.send_signal(signal.SIGUSR2)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    sweep = sweep_of(tmp_path)
    board = rows(sweep)
    assert board["0"]["status"] == "finished"
    assert board["0"]["updates"] == "90"
    log = (sweep / "0/train.log").read_text()
    assert "terminated (SIGTERM)" in log
    assert log.count("resuming at update") == 1


def _trains(controller: psutil.Process, job: int) -> bool:
    parts = controller.children(recursive=True)
    return any(f"/{job}'" in text for part in parts for text in part.cmdline())


SEARCH = (
    *(text for text in QUICK if not text.startswith("data.")),
    *("data.train_size=4", "data.val_size=2", "data.test_size=1", "data.resolution=64"),
    *("hparams_search=optuna", "epochs=1", "batch_size=0,2"),
)


@pytest.mark.slow
def test_a_search_goes_on_after_trials_that_fail_and_after_it_was_killed(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, output = train_by_command_line(tmp_path, *SEARCH, "hydra.sweeper.n_trials=4")
    assert code == 1, output  # some had batch_size=0
    sweep = sweep_of(tmp_path)
    board = rows(sweep)
    assert len(board) == 4
    failed = {job for job, row in board.items() if row["batch_size"] == "0"}
    assert {job for job, row in board.items() if row["status"] == "input"} == failed
    assert 0 < len(failed) < 4
    found = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    best = max(float(row["best_miou"]) for row in board.values() if row["best_miou"])
    assert math.isclose(found["best_value"], best)
    assert found["best_params"]["batch_size"] == 2

    (good,) = [job for job in board if job not in failed][-1:]
    typed = (sweep / good / "overrides.yaml").read_text()
    for name in ("config.yaml", "metrics.json", "checkpoints/last.pt", "checkpoints/best.pt"):
        (sweep / good / name).unlink()  # as if this trial had just begun
    before = {job: (sweep / job / "overrides.yaml").stat().st_mtime_ns for job in failed}
    code, output = train_by_command_line(tmp_path, f"resume_sweep={sweep}")
    assert code == 1, output
    assert (sweep / good / "overrides.yaml").read_text() == typed
    assert rows(sweep)[good]["best_miou"] == board[good]["best_miou"]
    # A trial that failed stays so, or the search would take another turn.
    assert {job: (sweep / job / "overrides.yaml").stat().st_mtime_ns for job in failed} == before


def test_a_search_in_a_storage_adds_trials_and_says_how_when_it_is_resumed(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    wrong = (*(text for text in SEARCH if not text.startswith("batch_size")), "batch_size=0")
    kept = ("hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=mine")
    for count in (2, 1):
        code, output = train_by_command_line(
            tmp_path, *wrong, *kept, f"hydra.sweeper.n_trials={count}"
        )
        assert code == 2, output
        assert "no trial has a score" in output
        assert "Leader board" in output
        assert "Traceback" not in output
    with sqlite3.connect(tmp_path / "study.db") as study:
        states = [state for (state,) in study.execute("select state from trials")]
    assert states == ["FAIL"] * 3
    sweep = next(tmp_path.glob("multirun/*/*"))
    code, output = train_by_command_line(tmp_path, f"resume_sweep={sweep}")
    assert code == 2
    assert "launch it again with the same storage" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra/launcher=joblib", "hydra/launcher=joblib: not installed"),
        ("hparams_search=optuna", "hydra/sweeper=segfit_optuna: not installed"),
    ],
)
def test_an_engine_that_is_not_installed_is_reported(tmp_path, override, message):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['hydra_plugins'] = None\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    code, output = train_by_command_line(
        tmp_path, "-m", *QUICK, override, "epochs=1", "batch_size=2", PYTHONPATH=paths
    )
    assert code == 2, output
    assert message in output
    assert "requirements-sweeps.txt" in output
    assert not (tmp_path / "multirun").exists()
