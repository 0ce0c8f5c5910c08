from io import StringIO

from rich.console import Console

from segfit.engine.events import EndLog
from segfit.report.console import console_report
from segfit.report.session import run_listener
from segfit.runs.folder import RunFolder


def test_what_other_processes_post_is_told_once_and_logged(tmp_path):
    printed = StringIO()
    console = console_report(Console(file=printed, width=200))
    posts = [["precision fell back", "a.png is bad"], ["a.png is bad", "b.png is bad", "oom"]]
    before = ["precision fell back"]
    listener = run_listener(
        RunFolder(tmp_path), console, [], "", {}, notices=before, posted=lambda: posts.pop(0)
    )
    listener.notice("oom")
    for updates in (1, 2):
        listener.end(EndLog("finished", updates, {}, None, 1.0))
    listener.close()
    for told in (printed.getvalue(), (tmp_path / "train.log").read_text()):
        assert told.count("a.png is bad") == told.count("b.png is bad") == told.count("oom") == 1
    assert "precision" not in printed.getvalue()  # was told before there was a run folder
