"""A folder belongs to one process, as long as that lives and no longer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.runs import lock as locks

HOLD = (
    "import sys, time, os\nfrom pathlib import Path\nfrom segfit.runs import lock as locks\n"
    "locks.lock(Path(sys.argv[1]))\n{more}\nprint('has it', flush=True)\ntime.sleep(60)"
)
# A data worker: forked after the lock was taken, alive after its parent was killed.
FORK = "if os.fork() == 0:\n    time.sleep(60)"

pytestmark = pytest.mark.skipif(os.name != "posix", reason="flock is POSIX's")


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


def test_a_second_process_is_told_who_has_the_folder(tmp_path):
    first = holding(tmp_path)
    try:
        assert locks.holder(tmp_path) == f"process {first.pid} on {os.uname().nodename}"
        with pytest.raises(locks.InUseError, match=f"in use by process {first.pid} on "):
            locks.lock(tmp_path)
    finally:
        end(first)
    assert locks.holder(tmp_path) is None
    locks.lock(tmp_path)
    locks.lock(tmp_path)  # which has it already
    assert locks.holder(tmp_path) is None
    locks.release(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resumed", [False, True])
def test_neither_a_new_run_nor_a_resumed_one_goes_into_a_folder_in_use(tmp_path, resumed):
    first = holding(tmp_path)
    try:
        with pytest.raises(locks.InUseError, match=f"in use by process {first.pid} on "):
            runs.claim(tmp_path, resumed=resumed)
    finally:
        end(first)


def test_workers_that_outlive_their_process_do_not_keep_the_folder(tmp_path):
    first = holding(tmp_path, FORK)
    try:
        first.kill()
        first.wait()
        deadline = time.monotonic() + 30
        while locks.holder(tmp_path) is not None and time.monotonic() < deadline:
            time.sleep(0.01)
        locks.lock(tmp_path)
        locks.release(tmp_path)
    finally:
        end(first)


def test_where_there_are_no_locks_it_goes_on_without(tmp_path, monkeypatch):
    def unsupported(*_arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks._FCNTL, "flock", unsupported)
    locks.lock(tmp_path)
    assert locks.holder(tmp_path) is None
    monkeypatch.setattr(locks, "_FCNTL", None)
    locks.lock(tmp_path)
    assert locks.holder(tmp_path) is None


def test_on_a_full_disk_the_lock_holds_without_a_name(tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    locks.lock(tmp_path)
    monkeypatch.undo()
    ask = "import sys\nfrom pathlib import Path\nfrom segfit.runs import lock as locks\nprint(locks.holder(Path(sys.argv[1])))"
    command = [sys.executable, "-c", ask, str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "another process\n"
    locks.release(tmp_path)


def test_only_one_of_torchruns_processes_claims_whatever_else_is_called_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    runs.claim(tmp_path, resumed=False)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.delenv("WORLD_SIZE")
    runs.claim(tmp_path, resumed=False)
    assert (tmp_path / locks.LOCK).exists()
    locks.release(tmp_path)


def test_a_lock_that_is_a_link_is_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / locks.LOCK).symlink_to(victim)
    with pytest.raises(SegFitError, match="it is a link"):
        locks.lock(tmp_path / "run")
    assert victim.read_text() == "precious"


def test_a_lock_that_its_owner_removes_at_the_same_moment_is_taken_anew(tmp_path, monkeypatch):
    opened, tries = locks._open, []

    def slowly(folder, flags=0):
        handle = opened(folder, flags)
        tries.append(handle)
        if len(tries) == 1:
            (folder / locks.LOCK).unlink()
        return handle

    monkeypatch.setattr(locks, "_open", slowly)
    locks.lock(tmp_path)
    held = os.fstat(tries[1]).st_ino
    assert (tmp_path / locks.LOCK).stat().st_ino == held
    locks.release(tmp_path)
    assert len(tries) == 2
