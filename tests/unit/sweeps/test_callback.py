"""The end of a sweep: its leader board, whatever the disk says."""

import json
from pathlib import Path

import pytest

from segfit.sweeps import callback as sweep


def test_a_leader_board_that_cannot_be_written_is_told_and_failures_still_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep.LeaderBoard, "failed", 0)
    (tmp_path / "0").mkdir()
    (tmp_path / "0/error.json").write_text(json.dumps({"kind": "crash", "message": "a bug"}))
    (tmp_path / "leaderboard.csv").mkdir()
    (row,) = sweep.show(tmp_path)
    assert row.failed
    assert sweep.LeaderBoard.failed == 1
    told = capsys.readouterr().out
    assert "crash: a bug" in told
    assert "leaderboard.csv: cannot be written (Is a directory)." in told
