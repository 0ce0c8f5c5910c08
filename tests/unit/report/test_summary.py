import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from segfit.report.summary import next_commands, print_summary, score_table, write_metrics
from tests.unit.report import events


def printed(width, show):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=False, highlight=False, _environ={})
    show(console)
    return file.getvalue()


def rows(text):
    cells = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in text.splitlines()]
    return {row[0].removeprefix("■ "): row[1:] for row in cells if len(row) > 1}


def test_absent_classes_have_no_score_and_count_in_no_mean():
    table = rows(printed(100, lambda c: c.print(score_table(events.result(0.5), events.CLASSES))))
    assert table["liver"] == ["0.5000", "0.5000", "0.5000", "50.0%"]
    assert table["kidney"] == ["–", "–", "–", "0.0%"]
    assert table["macro mean"][0] == "0.7000"
    assert table["foreground mean"][0] == "0.5000"


def test_without_any_pixel_every_score_is_a_dash():
    nothing = dataclasses.replace(
        events.result(),
        scores={"pixel_accuracy": float("nan")},
        per_class={
            measure: dict.fromkeys(events.CLASSES.names) for measure in ("iou", "f1", "accuracy")
        },
        confusion=np.zeros((3, 3), np.int64),
    )
    text = printed(100, lambda c: c.print(score_table(nothing, events.CLASSES)))
    assert rows(text)["macro mean"][0] == "–"
    assert "pixel accuracy –" in text


def summary(end, run_dir, checkpoint, width=40):
    return printed(
        width,
        lambda console: print_summary(
            end,
            monitor="miou",
            run_dir=run_dir,
            checkpoint=checkpoint,
            tensorboard_dir=run_dir / "tensorboard",
            console=console,
        ),
    )


def test_the_commands_can_be_copied_from_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "a rather long name with spaces [v2]" / "12-00-00"
    text = summary(events.end_log(8), run, run / "best.pt")
    lines = [line.strip() for line in text.splitlines()]
    where = "outputs/a rather long name with spaces [v2]/12-00-00"
    assert f"tensorboard --logdir '{where}/tensorboard'" in lines
    assert f"Checkpoint: {where}/best.pt" in lines
    assert any(line.startswith("python evaluate.py") and line.count(where) == 1 for line in lines)
    assert "Best: mIoU 0.6000, macro F1 0.7000, foreground F1 – (epoch 2)" in lines
    assert "all epochs are done" in text
    assert "resume" not in text


def test_an_interrupted_run_is_told_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "1"
    text = summary(events.end_log(3, "interrupted", best_epoch=None), run, None)
    assert "  python train.py resume=outputs/1\n" in text
    assert "evaluate.py" not in text
    assert "No validation yet" in text


@pytest.mark.parametrize(
    ("reason", "resumes"),
    [("finished", False), ("patience", False), ("interrupted", True), ("terminated", True)],
)
def test_only_what_was_stopped_is_to_be_resumed(reason, resumes):
    commands = next_commands(events.end_log(8, reason), Path("r"), Path("r/best.pt"), None)
    assert any("resume=" in command for command in commands) == resumes
    assert not any("tensorboard" in command for command in commands)


def test_metrics_are_strict_json(tmp_path):
    path = tmp_path / "metrics.json"
    write_metrics(
        path,
        {
            "nan": float("nan"),
            "inf": [np.float64("inf"), 1.5],
            "int": np.int64(3),
            "confusion": np.eye(2, dtype=np.int64),
            "run": Path("outputs/1"),
            "nested": {"none": None, "ok": True, 1: "ä"},
        },
    )

    def no_constants(name):
        raise AssertionError(name)

    assert json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constants) == {
        "nan": None,
        "inf": [None, 1.5],
        "int": 3,
        "confusion": [[1, 0], [0, 1]],
        "run": "outputs/1",
        "nested": {"none": None, "ok": True, "1": "ä"},
    }


def test_a_failed_write_leaves_the_old_metrics(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_metrics(path, {"miou": 0.5})

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_metrics(path, {"miou": 0.6})
    assert json.loads(path.read_text()) == {"miou": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]
