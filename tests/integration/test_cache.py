"""Runs with a cache of decoded images: the same training, with a line about it, and evaluated without it."""

import json
import subprocess

import pytest

from segfit.errors import SegFitError
from tests.integration.training import (
    TINY,
    command,
    environment,
    resume,
    same,
    the_run,
    train,
    train_by_command_line,
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(("cache", "workers"), [("ram", 1), ("disk", 0)])
def test_a_cache_changes_no_loss_and_no_score(tmp_path, plain, cache, workers):
    cached = train(
        tmp_path / "run",
        f"data.cache={cache}",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"loader.workers={workers}",
    )
    assert cached.losses == plain.losses
    assert cached.end.best_scores == plain.end.best_scores
    assert same(cached.model.state_dict(), plain.model.state_dict())
    (line,) = [line for line in cached.notices if "data.cache" in line]
    assert line.startswith(f"data.cache={cache}: 30 samples, 30 of them decoded now")


def test_a_run_may_go_on_with_another_cache(tmp_path):
    train(tmp_path, "data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}", "epochs=1")
    done = resume(tmp_path, "epochs=2", "data.cache=none")
    assert done.end.reason == "finished"


@pytest.mark.slow
def test_the_command_line_tells_what_is_kept_and_evaluation_needs_none(tmp_path):
    arguments = (*TINY, "data.cache=disk", f"data.cache_dir={tmp_path / 'cache'}", "epochs=1")
    code, output = train_by_command_line(tmp_path, *arguments)
    assert code == 0
    assert f"below {tmp_path / 'cache' / 'decoded'}" in output.replace("\n", "")
    run = the_run(tmp_path)
    assert "data.cache=disk: 30 samples" in (run / "train.log").read_text()
    for path in (tmp_path / "cache").rglob("*.*"):
        if path.is_file():
            path.unlink()
    out = tmp_path / "scores"
    evaluate = command(f"run={run}", f"out={out}", "worst=0", script="evaluate.py")
    subprocess.run(evaluate, cwd=tmp_path, env=environment(), check=True, capture_output=True)
    assert json.loads((run / "metrics.json").read_text())["best"]
    assert list(out.glob("*.json"))


def test_a_cache_that_cannot_be_written_stops_the_run_before_it_starts(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SegFitError, match=r"data\.cache_dir"):
        train(tmp_path / "run", "data.cache=disk", f"data.cache_dir={tmp_path / 'file'}")
