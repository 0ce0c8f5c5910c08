"""A sweep is searched in the direction of its score, and its leader board is printed whatever the disk says."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from segfit.sweeps import callback as sweep


def test_a_leader_board_that_cannot_be_written_is_named_and_failures_still_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep.LeaderBoard, "failed", 0)
    (tmp_path / "0").mkdir()
    (tmp_path / "0/error.json").write_text(json.dumps({"kind": "crash", "message": "a bug"}))
    (tmp_path / "leaderboard.csv").mkdir()
    (row,) = sweep.show(tmp_path)
    assert row.failed
    assert sweep.LeaderBoard.failed == 1
    printed = capsys.readouterr().out
    assert "crash: a bug" in printed
    assert "leaderboard.csv: cannot be written (Is a directory)." in printed
    assert "tensorboard" not in printed  # no job wrote there


@pytest.mark.parametrize(("mode", "direction"), [("max", "maximize"), ("min", "minimize")])
def test_a_search_takes_the_direction_of_the_score(mode, direction, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "monitor_mode", lambda config: mode)
    own = {"sweep": {"dir": "?"}, "sweeper": {"direction": "?"}, "overrides": {"hydra": []}}
    config = OmegaConf.create({"hydra": own})
    sweep._complete(config, tmp_path)
    assert config.hydra.sweeper.direction == direction
    assert config.hydra.overrides.hydra == [f"hydra.sweep.dir='{tmp_path}'"]
