"""A file is whole or not there, whatever ends the writer."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from segfit.system.files import atomic_write, remove_partials, replace_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_and_its_folder_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / ("ü" * 120 + ".txt")  # almost as long as a name may be
    for text in ("one", "zwölf"):
        replace_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file_and_leaves_nothing(
    tmp_path: Path, error: BaseException
) -> None:
    path, previous = tmp_path / "a", tmp_path / "b"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path, previous=previous) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a"]


def test_the_old_file_can_be_kept(tmp_path: Path) -> None:
    for text in (b"1", b"2", b"3"):
        with atomic_write(tmp_path / "a", previous=tmp_path / "b", sync=False) as file:
            file.write(text)
    assert (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes() == b"32"


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    die = (
        "import os, sys, pathlib\nfrom segfit.system.files import atomic_write\n"
        "with atomic_write(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write(b'half')\n    os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", die, str(tmp_path / "a")])
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    assert len(names(tmp_path)) == 2
    remove_partials(tmp_path / "a")
    assert names(tmp_path) == ["a"]
