import io

import pytest
from rich.console import Console

from segfit.report.console import print_summary
from segfit.report.page import next_commands
from segfit.runs.files import RunFolder
from tests.unit.report import events


def printed(width, show):
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=False, highlight=False, _environ={})
    show(console)
    return file.getvalue()


def run_files(run_dir, *, best):
    files = RunFolder(run_dir)
    files.tensorboard.mkdir(parents=True)
    if best:
        files.checkpoints.mkdir()
        files.best.touch()
    return files


def summary(end, run_dir, *, best, width=40, remark=""):
    return printed(
        width,
        lambda console: print_summary(
            end,
            columns=events.COLUMNS,
            remark=remark,
            files=run_files(run_dir, best=best),
            console=console,
        ),
    )


def test_the_commands_can_be_copied_from_a_narrow_terminal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "a rather long name with spaces [v2]" / "12-00-00"
    text = summary(events.end_log(8), run, best=True, remark="Worse [than] nothing.")
    lines = [line.strip() for line in text.splitlines()]
    where = "outputs/a rather long name with spaces [v2]/12-00-00"
    assert f"tensorboard --logdir '{where}/tensorboard'" in lines
    assert f"Checkpoint: {where}/checkpoints/best.pt" in lines
    assert any(line.startswith("python evaluate.py") and line.count(where) == 1 for line in lines)
    assert "Best: mIoU 0.6000, macro F1 0.7000, foreground F1 – (epoch 2)" in lines
    assert "Worse [than] nothing." in lines
    assert "all epochs are done" in text
    assert "resume" not in text


def test_an_interrupted_run_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "outputs" / "1"
    text = summary(events.end_log(3, "interrupted", best_epoch=None), run, best=False)
    assert "  python train.py resume=outputs/1\n" in text
    assert "evaluate.py" not in text
    assert "No validation gave" in text


@pytest.mark.parametrize(
    ("reason", "resumes"),
    [("finished", False), ("patience", False), ("interrupted", True), ("terminated", True)],
)
def test_only_what_was_stopped_is_to_be_resumed(reason, resumes, tmp_path):
    commands = next_commands(reason, RunFolder(tmp_path))
    assert any("resume=" in command for command in commands) == resumes
    assert not any("tensorboard" in command for command in commands)
