import csv
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from segfit.report.text import grid
from segfit.sweeps.leaderboard import board, collect, write_csv


@pytest.fixture
def sweep(tmp_path):
    """Six jobs: three that finished, one each that ran out of memory, was killed, left a torn file."""

    def job(number, batch_size, metrics=None, error=None):
        folder = tmp_path / str(number)
        folder.mkdir()
        overrides = ["data=shapes", f"batch_size={batch_size}", "+loss=dice"]
        (folder / "overrides.yaml").write_text("".join(f"- {item}\n" for item in overrides))
        if metrics is not None:
            (folder / "metrics.json").write_text(metrics)
        if error is not None:
            (folder / "error.json").write_text(json.dumps(error))

    def metrics(score):
        return json.dumps(
            {
                "status": "finished",
                "best": {"miou": score, "macro_f1": 0.9, "foreground_f1": None, "loss": 0.25},
                "best_epoch": 4,
                "updates": 100,
                "samples_per_second": 45.25,
                "peak_memory_gib": 3.5,
                "seconds": 185.0,
                "facts": {"device": "cpu"},
                "monitor": "miou",
                "columns": {"macro_f1": "macro F1", "miou": "mIoU"},
                "unit": "img",
            }
        )

    oom = {"kind": "oom", "message": "CUDA out of memory.\n" + 30 * "Tried [GPU] ", "exit_code": 1}
    job(0, 2, metrics(0.61))
    job(1, 4, metrics(None))
    job(2, 8, error=oom)
    job(9, 16, metrics(0.72))
    job(10, 32)
    job(11, 64, metrics="{")
    (tmp_path / "leaderboard").mkdir()
    return tmp_path


def shown(rows):
    file = io.StringIO()
    Console(file=file, width=160, highlight=False, _environ={}).print(grid(board(rows)))
    return file.getvalue()


def test_the_best_comes_first_and_failures_last(sweep):
    rows = collect(sweep)
    assert [(row.job, row.status) for row in rows] == [
        (9, "finished"),
        (0, "finished"),
        (1, "finished"),  # without a score
        (2, "oom"),
        (10, "unfinished"),
        (11, "unreadable"),
    ]
    assert [row.failed for row in rows] == [False, False, False, True, True, True]
    assert rows[0].score == 0.72
    assert rows[0].overrides == {"data": "shapes", "batch_size": "16", "loss": "dice"}


def test_the_board_shows_what_differs_and_why_jobs_failed(sweep):
    text = shown(collect(sweep))
    assert text.splitlines()[0].strip() == "Leader board (data=shapes loss=dice)"
    cells = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in text.splitlines()]
    table = {row[0]: row[1:] for row in cells if row[0].isdigit()}
    assert text.index("mIoU") < text.index("macro F1") < text.index("img/s")
    assert table["9"] == ["16", "0.7200", "0.9000", "45.2", "3.50", "3:05", "finished"]
    assert table["1"][1] == "–"
    assert table["2"][1:6] == ["–"] * 5
    assert table["2"][6].startswith("oom: CUDA out of memory. Tried [GPU]")
    assert table["2"][6].endswith("…")


def test_where_less_is_better_the_lowest_score_comes_first(tmp_path):
    for number, score in enumerate([0.3, 0.1, None, 0.2]):
        folder = tmp_path / str(number)
        folder.mkdir()
        metrics = {"monitor": "mse", "monitor_mode": "min", "best": {"mse": score, "mae": 0.5}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    rows = collect(tmp_path)
    assert [row.job for row in rows] == [1, 3, 0, 2]
    assert "mse" in shown(rows)
    assert "sample/s" in shown(rows)


def test_a_sweep_without_jobs_has_an_empty_board(tmp_path):
    assert collect(tmp_path) == []
    assert "Leader board" in shown([])


def test_the_csv_has_a_line_a_job_and_a_column_an_option(sweep, monkeypatch):
    monkeypatch.chdir(sweep)
    write_csv(collect(sweep), sweep / "leaderboard.csv")
    with (sweep / "leaderboard.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    best = rows[0]
    assert (best["batch_size"], best["loss"], best["best_loss"]) == ("16", "dice", "0.25")
    assert (best["best_miou"], best["best_epoch"], best["samples_per_second"]) == (
        "0.72",
        "4",
        "45.25",
    )
    assert best["path"] == "9"
    assert rows[3]["status"] == "oom"
    assert rows[3]["best_miou"] == ""
    assert None not in best  # no line is longer than the header


def test_the_parent_of_a_sweep_stays_light():
    code = (
        "import sys, segfit.sweeps.leaderboard;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_folds_and_seeds_are_averaged_with_their_spread(tmp_path):
    scores = {("ce", 0): 0.5, ("ce", 1): 0.7, ("ce", 2): 0.9, ("dice", 0): 0.8, ("dice", 1): None}
    for number, ((loss, fold), score) in enumerate(scores.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "overrides.yaml").write_text(f"- loss={loss}\n- data.split.fold={fold}\n")
        best = {"miou": score, "macro_f1": 0.25}
        (folder / "metrics.json").write_text(
            json.dumps({"best": best, "monitor": "miou", "columns": {"macro_f1": "macro F1"}})
        )
    lines = [
        [cell.strip() for cell in line.strip("│┃ ").split("│")]
        for line in shown(collect(tmp_path)).splitlines()
    ]
    means = [line for line in lines if line[0].startswith("mean")]
    (mean,) = means  # a single fold of dice has a score
    spread = np.std([0.5, 0.7, 0.9], ddof=1)
    assert mean == ["mean of 3", "ce", "", f"0.7000 ± {spread:.4f}", "0.2500 ± 0.0000"]
