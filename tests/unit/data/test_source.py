"""Files of a folder."""

import os
from pathlib import Path

import pytest

from segfit.data.source import list_files
from segfit.errors import SegFitError


def test_a_folder_that_cannot_be_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/locked").mkdir(parents=True)
    (tmp_path / "a/1.png").touch()
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)  # the tests may run as root, who may read all
    with pytest.raises(SegFitError, match=r"a/locked: cannot be read \(Permission denied\)"):
        list_files(tmp_path / "a", (".png",))
    assert list_files(tmp_path / "nowhere", ()) == []
