"""A folder belongs to one process, as long as that lives and no longer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segfit.runs import folder as runs

fcntl = pytest.importorskip("fcntl")  # the processes here are POSIX's

HOLD = (
    "import sys, time, os\nfrom pathlib import Path\nfrom segfit.runs import folder as runs\n"
    "runs.lock(Path(sys.argv[1]))\n{more}\nprint('has it', flush=True)\ntime.sleep(60)"
)
# A data worker: forked after the lock was taken, alive after its parent was killed.
FORK = "if os.fork() == 0:\n    time.sleep(60)"


def holding(folder: Path, more: str = "") -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(more=more), str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "has it\n"
    return process


def end(process: "subprocess.Popen[str]") -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_a_second_process_learns_who_has_the_folder(tmp_path):
    first = holding(tmp_path)
    try:
        assert runs.holder(tmp_path) == f"process {first.pid} on {os.uname().nodename}"
        with pytest.raises(runs.InUseError, match=f"in use by process {first.pid} on "):
            runs.lock(tmp_path)
    finally:
        end(first)
    assert runs.holder(tmp_path) is None
    runs.lock(tmp_path)
    runs.lock(tmp_path)  # which has it already
    assert runs.holder(tmp_path) is None
    runs.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resumed", [False, True])
def test_neither_a_new_run_nor_a_resumed_one_goes_into_a_folder_in_use(tmp_path, resumed):
    first = holding(tmp_path)
    try:
        with pytest.raises(runs.InUseError, match=f"in use by process {first.pid} on "):
            runs.claim(tmp_path, resumed=resumed)
    finally:
        end(first)


def test_workers_that_outlive_their_process_do_not_keep_the_folder(tmp_path):
    first = holding(tmp_path, FORK)
    try:
        first.kill()
        first.wait()
        deadline = time.monotonic() + 30
        while runs.holder(tmp_path) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        runs.lock(tmp_path)
        runs.release(tmp_path)
    finally:
        end(first)


def test_where_there_are_no_locks_it_continues_without(tmp_path, monkeypatch):
    def unsupported(*_arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    runs.lock(tmp_path)
    assert (tmp_path / runs.LOCK).exists()
    assert runs.holder(tmp_path) is None


def test_without_a_name_the_lock_holds(tmp_path):
    """As on a full disk."""
    first = holding(tmp_path, "(Path(sys.argv[1]) / runs.OWNER).unlink()")
    try:
        assert runs.holder(tmp_path) == "another process"
    finally:
        end(first)


def test_only_one_of_torchruns_processes_claims_whatever_else_is_called_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    runs.claim(tmp_path, resumed=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("WORLD_SIZE")
    runs.claim(tmp_path, resumed=False)
    assert (tmp_path / runs.LOCK).exists()
    runs.release(tmp_path)
