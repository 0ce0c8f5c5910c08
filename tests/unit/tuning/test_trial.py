"""A trial's process may end in any way; the parent lives, and tells."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from segfit.tuning.trial import Outcome, run_trial
from tests.unit.composing import composed

ROOT = Path(__file__).parents[3]
JOBS = "tests.unit.tuning.jobs"


@pytest.fixture(scope="module")
def config():
    return composed("model=cnn", "data=shapes", "batch_size=3", "hardware=cpu")


@pytest.fixture
def planted(monkeypatch, config):
    """Run a job of this folder's jobs.py in a child."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def run(job: str, timeout_s: float | None = 60, **arguments: Any) -> Outcome:
        return run_trial(config, job=f"{JOBS}:{job}", timeout_s=timeout_s, **arguments)

    return run


def gone(pid: int) -> bool:
    """Wait until a process has ended."""
    for _ in range(200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_job_gets_config_and_arguments_in_another_process(planted):
    outcome = planted("tell", sizes=[1, 2], word="ü", nothing=None)
    assert outcome.ok
    assert outcome.reason is None
    assert outcome.values.pop("pid") != os.getpid()
    assert outcome.values == {"batch_size": 3, "sizes": [1, 2], "word": "ü", "nothing": None}
    assert outcome.seconds > 0


def test_wrong_input_is_reported_with_all_its_problems(planted):
    outcome = planted("refuse")
    assert (outcome.ok, outcome.reason) == (False, "input")
    assert outcome.message == "data.root: no such folder.\nlr: too large."


def test_memory_that_ran_out_is_recognised(planted):
    outcome = planted("allocate")
    assert outcome.reason == "oom"
    assert "DefaultCPUAllocator: can't allocate memory" in outcome.message
    assert "\n" not in outcome.message


def test_a_bug_is_a_crash(planted):
    outcome = planted("crash")
    assert (outcome.ok, outcome.reason, outcome.message) == (False, "crash", "ValueError: a bug")


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_child_is_survived(planted):
    outcome = planted("die", number=int(signal.SIGKILL))
    assert (outcome.ok, outcome.reason) == (False, "crash")
    assert outcome.message.startswith("killed by SIGKILL (most likely the system, short of host")
    assert outcome.message.endswith("last words")
    assert "SIGSEGV" in planted("segfault").message
    assert planted("leave").message == "ended with exit code 3"


def test_time_runs_out(planted, tmp_path):
    pids = tmp_path / "pids"
    for patience in (
        1.5,
        6,
        24,
        96,
    ):  # a machine that has much else to do may not come to hang in time
        outcome = planted("hang", timeout_s=patience, tell_pids=str(pids))
        assert (outcome.ok, outcome.reason) == (False, "timeout")
        assert outcome.message == f"not done after {patience:g} s"
        if pids.exists() and pids.read_text():
            break
    assert all(gone(int(pid)) for pid in pids.read_text().split())


PARENT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore it
from segfit.tuning import trial
from tests.unit.composing import composed
job = "tests.unit.tuning.jobs:hang"
trial.run_trial(composed(), job=job, timeout_s=None, tell_pids=sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_child_ends_with_its_parent(tmp_path, number):
    pids = tmp_path / "pids"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(pids)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    _wait_for(pids)
    child, worker = map(int, pids.read_text().split())
    parent.send_signal(number)
    parent.wait(30)
    try:
        assert gone(child)
        if number == signal.SIGINT:
            assert gone(worker)
    finally:
        if psutil.pid_exists(worker):
            psutil.Process(worker).kill()


def _wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists() and path.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} was never written")
