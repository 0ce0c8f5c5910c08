"""What a job's folder holds decides whether it runs, goes on, starts over or is left alone."""

import json

import pytest

from segfit.runs import folder as runs
from segfit.sweeps import job as sweep_jobs
from segfit.sweeps.job import best_score, state_of

CRASH = {"kind": "crash", "message": "a bug", "exit_code": 1}
KILLED = {"kind": "crash", "message": "killed by signal 9", "exit_code": -9}
DONE = {"status": "finished", "monitor": "miou", "best": {"miou": 0.5}}


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "unstarted"),
        ({"overrides.yaml": []}, "unstarted"),
        ({"config.yaml": {}}, "interrupted"),
        ({"config.yaml": {}, "metrics.json": DONE}, "done"),
        ({"config.yaml": {}, "metrics.json": {"status": "max_steps"}}, "done"),
        ({"config.yaml": {}, "metrics.json": {"status": "patience"}}, "done"),
        ({"config.yaml": {}, "metrics.json": {"status": "terminated"}}, "interrupted"),
        ({"config.yaml": {}, "metrics.json": {"status": "interrupted"}}, "interrupted"),
        ({"config.yaml": {}, "metrics.json": []}, "interrupted"),
        ({"config.yaml": {}, "error.json": CRASH}, "failed"),
        ({"config.yaml": {}, "error.json": KILLED}, "interrupted"),
        ({"error.json": KILLED}, "failed"),
        ({"config.yaml": {}, "metrics.json": DONE, "error.json": CRASH}, "failed"),
        ({"config.yaml": {}, "error.json": [1]}, "failed"),
    ],
)
def test_states(files, state, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert state_of(tmp_path) == state


def test_a_job_that_is_trained_by_another_process_runs(tmp_path, monkeypatch):
    (tmp_path / "metrics.json").write_text(json.dumps(DONE))
    monkeypatch.setattr(runs, "holder", lambda folder: "process 1 on elsewhere")
    assert state_of(tmp_path) == "running"


def test_a_score_is_a_number_or_none(tmp_path):
    job = tmp_path / "3"
    job.mkdir()
    assert best_score(job) is None
    (job / "metrics.json").write_text(json.dumps(DONE))
    assert best_score(job) == 0.5
    (job / "error.json").write_text(json.dumps(CRASH))
    assert best_score(job) is None
    (job / "error.json").unlink()
    (job / "metrics.json").write_text(json.dumps({**DONE, "best": {"miou": None}}))
    assert best_score(job) is None


def test_what_a_failed_job_left_is_kept(tmp_path):
    for number in (1, 2):
        (tmp_path / "3").mkdir(exist_ok=True)
        (tmp_path / "3/error.json").write_text("{}")
        sweep_jobs._set_aside(tmp_path / "3")
        assert (tmp_path / f"3-failed-{number}/error.json").exists()
        assert list((tmp_path / "3").iterdir()) == []


@pytest.mark.parametrize(("at_a_time", "threads"), [(2, "4"), (3, "2"), (16, "1"), (-1, "1")])
def test_jobs_side_by_side_share_the_cores(at_a_time, threads, monkeypatch):
    monkeypatch.setattr(sweep_jobs, "available_cores", lambda: 8)
    assert sweep_jobs._threads({"n_jobs": at_a_time}) == {"OMP_NUM_THREADS": threads}
    assert sweep_jobs._threads({"n_jobs": 1}) == sweep_jobs._threads({}) == {}
