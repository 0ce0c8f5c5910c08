import re

import pytest

from segfit.errors import SegFitError
from segfit.report.lines import Eta, LogFile, validations
from tests.unit.report import events

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def test_every_line_of_the_log_file_has_a_time_and_is_there_at_once(tmp_path):
    path = tmp_path / "new" / "train.log"
    log = LogFile(path)
    events.train(log)

    lines = path.read_text(encoding="utf-8").splitlines()  # not closed yet
    assert all(TIMESTAMP.match(line) for line in lines)
    assert lines[0].endswith("device: cpu [2 cores]")
    assert sum(" done: " in line for line in lines) == 2
    log.close()


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    path = tmp_path / "train.log"
    for first, last in ((0, 4), (4, 8)):
        log = LogFile(path)
        events.train(log, first, last)
        log.end(events.end_log(last, "interrupted" if last == 4 else "finished"))
        log.close()

    text = path.read_text(encoding="utf-8")
    assert text.index("interrupted (Ctrl-C)") < text.index("resuming at update 4")
    assert re.findall(r"epoch (\d)/2 done", text) == ["1", "2"]


def test_a_closed_log_file_ignores_what_comes_late(tmp_path):
    log = LogFile(tmp_path / "train.log")
    log.close()
    log.close()
    log.notice("too late")
    assert (tmp_path / "train.log").read_text() == ""


def test_a_log_file_that_cannot_be_made_is_reported(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SegFitError, match=r"file/train\.log: cannot write the log file"):
        LogFile(tmp_path / "file" / "train.log")


def test_eta_leaves_the_slow_first_update_out(monkeypatch):
    now = iter([1000.0, 1010.0])
    monkeypatch.setattr("segfit.report.lines.time.monotonic", lambda: next(now))
    eta = Eta(total_updates=100)
    assert eta.seconds(11) != eta.seconds(11)  # NaN: a first update says nothing


def test_eta_is_the_mean_pace_of_this_session(monkeypatch):
    times = iter([1000.0, 1010.0])
    monkeypatch.setattr("segfit.report.lines.time.monotonic", lambda: next(times))
    eta = Eta(total_updates=100)
    eta.seconds(51)  # resumed at 50
    assert eta.seconds(71) == pytest.approx(29 * 10 / 20)


def test_a_line_of_scores_that_a_full_disk_cut_off_is_left_out(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_text('{"epoch": 0, "update": 4}\n{"epoch": 1, "upd{"epoch": 2}\n{"epoch": 3}\n')
    assert [line["epoch"] for line in validations(path)] == [0, 3]
