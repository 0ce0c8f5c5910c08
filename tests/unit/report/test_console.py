import dataclasses
import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from segfit.engine.events import RunInfo
from segfit.engine.findings import Column, Findings, Table
from segfit.report.console import LiveReport, console_report
from segfit.report.lines import LineReport
from segfit.report.text import grid, stdout_console
from tests.unit.report import events


def terminal(width: int = 100, encoding: str = "utf-8") -> tuple[Console, io.TextIOWrapper]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="", write_through=True)
    console = Console(file=file, force_terminal=True, width=width, highlight=False, _environ={})
    return console, file


def written(file: io.TextIOWrapper) -> str:
    assert isinstance(file.buffer, io.BytesIO)
    return file.buffer.getvalue().decode(file.encoding)


def screen(file: io.TextIOWrapper) -> list[str]:
    """Return every line that was ever drawn, without escape codes."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(file))
    return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]


def test_without_a_terminal_there_are_plain_lines_only():
    file = io.StringIO()
    report = console_report(Console(file=file, force_terminal=False, width=40, _environ={}))

    events.train(report)
    report.notice("precision=fp16 needs [CUDA]:\n  training in fp32 instead of what was asked for.")
    report.end(events.end_log(8))

    assert isinstance(report, LineReport)
    text = file.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert "device: cpu [2 cores]" in lines
    assert (
        "notice: precision=fp16 needs [CUDA]: training in fp32 instead of what was asked for."
        in lines
    )
    assert any(line.startswith("epoch 1/2 update 4/8 loss 0.2500 lr 0.0003") for line in lines)
    assert any(
        line.startswith("epoch 2/2 done: loss 0.7500 mIoU 0.6000 macro F1 0.7000 foreground F1 –")
        and line.endswith("new best")
        for line in lines
    )
    assert lines[-1] == "training ended after 8 updates in 1:23: all epochs are done"


def test_a_dumb_terminal_gets_plain_lines():
    console = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(console_report(console), LineReport)


def test_a_terminal_gets_facts_a_bar_and_a_line_an_epoch():
    console, file = terminal(width=120)
    report = console_report(console)
    assert isinstance(report, LiveReport)

    events.train(report)
    report.epoch(events.epoch_log(2, is_best=False, validated=False))
    report.close()

    lines = screen(file)
    assert any(line.startswith("device") and line.endswith("cpu [2 cores]") for line in lines)
    bars = [line for line in lines if "━" in line]
    assert re.search(
        r"━+ 8/8 loss 0\.1250  mIoU 0\.\d+  45\.3 img/s  3\.2 GiB  wait 2%  ETA 0\.0s",
        "\n".join(bars),
    )
    rows = [line.split() for line in lines if re.match(r" +\d/2 ", line)]
    assert rows[0] == [
        "1/2",
        "0.7500",
        "0.5000",
        "0.6000",
        "–",
        "3.00e-04",
        "45.3",
        "2%",
        "3.25",
        "GiB",
        "1:15",
        "★",
    ]
    assert rows[2] == ["3/2", "0.7500", *"–––", "3.00e-04", "45.3", "2%", "3.25", "GiB", "1:15"]


@pytest.mark.parametrize(("width", "scores"), [(60, 1), (80, 2), (92, 3)])
def test_the_epoch_table_shows_as_many_scores_as_fit(width, scores):
    console, file = terminal(width)
    report = console_report(console)
    events.train(report)
    report.close()
    head = next(line for line in screen(file) if line.lstrip().startswith("epoch  "))
    shown = [label for label in events.COLUMNS.values() if f" {label} " in head]
    assert shown == list(events.COLUMNS.values())[:scores]
    rows = [line for line in screen(file) if line.endswith("1:15 ★")]
    assert len(rows) == 2 or width == 60  # whole, unless the terminal is too narrow for one score


def test_a_task_names_its_samples_and_scores():
    lines: list[str] = []
    report = LineReport(lines.append)
    report.start(RunInfo(1, 4, 0, 0, 4, {}, unit="window", columns={"mse": "MSE"}))
    report.log(events.step_log(2))
    report.epoch(dataclasses.replace(events.epoch_log(0), result=Findings(scores={"mse": 0.25})))
    assert "45.3 window/s" in lines[-2]
    assert "loss 0.7500 MSE 0.2500 lr" in lines[-1]


def test_tables_are_whole_in_a_file(monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    monkeypatch.setattr("sys.stdout", file)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    columns = [Column(f"a long heading {index}") for index in range(20)]
    stdout_console().print(grid(Table("wide", "Wide", columns, [["cell"] * 20])))
    text = written(file)
    assert all(column.name in text for column in columns)
    assert "…" not in text
    assert len({len(line) for line in text.splitlines()[1:]}) == 1


def test_validation_shows_in_the_bar():
    console, file = terminal()
    report = LiveReport(console)
    report.start(events.info())
    report.validating(3, 3)
    report._progress.refresh()  # what its thread does ten times a second
    report.close()
    assert any(line.startswith("val 3/3 ") and "━" in line for line in screen(file))


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_bar_and_the_epoch_stay_on_one_line(width):
    console, file = terminal(width)
    report = console_report(console)
    events.train(report)
    report.close()

    bars = [line for line in screen(file) if "━" in line]
    assert all(len(bar) <= width for bar in bars)
    assert all("…" not in bar for bar in bars)
    assert any("loss 0.1250" in bar and "ETA" in bar for bar in bars)


def test_a_notice_is_one_line_whatever_its_length():
    console, file = terminal(width=40)
    report = console_report(console)
    report.start(events.info())
    report.notice("out of memory: batch_size 8 → 4, accumulate 1 → 2.\nThe step is redone [once].")
    report.close()
    expected = "! out of memory: batch_size 8 → 4, accumulate 1 → 2. The step is redone [once]."
    assert expected in screen(file)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_the_encoding_lacks_ends_no_training(is_terminal, monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii", newline="", write_through=True)
    monkeypatch.setattr(file, "isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdout", file)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)

    report = console_report(stdout_console())
    events.train(report)
    report.notice("batch 8 → 4")
    report.close()

    assert isinstance(report, LiveReport) == is_terminal
    lines = screen(file)
    assert any(line.endswith("batch 8 ? 4") for line in lines)
    assert any(line.endswith("1:15 *" if is_terminal else "1:15 new best") for line in lines)


def test_steps_are_drawn_at_most_ten_times_a_second(monkeypatch):
    now, drawn, redraw = [100.0], [], LiveReport._redraw

    def counted(self, description):
        drawn.append(description)
        redraw(self, description)

    monkeypatch.setattr("segfit.report.console.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(LiveReport, "_redraw", counted)
    console, _ = terminal()
    report = LiveReport(console)
    report.start(events.info(epochs=1000))
    drawn.clear()
    for update in range(1, 1001):
        now[0] += 0.001
        report.step(0, update)
    report.close()
    assert 9 <= len(drawn) <= 10


def test_closing_gives_the_cursor_back_also_without_an_end():
    console, file = terminal()
    report = console_report(console)
    report.start(events.info())
    report.step(0, 1)
    report.close()
    report.close()
    text = written(file)
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")
