import io

from rich.console import Console

from segfit.report.console import WorkProgress


def shown(terminal: bool, lines: bool) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80, _environ={"TERM": "xterm"})
    progress = WorkProgress(console, lines=lines)
    for what, total in (("checking", 2), ("decoding", 2)):
        for done in range(total + 1):
            progress(done, total, what)
    progress.close()
    progress.close()
    return file.getvalue()


def test_a_terminal_gets_a_bar_that_is_removed():
    text = shown(terminal=True, lines=False)
    assert "decoding" in text
    assert "━" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_elsewhere_there_is_nothing_or_a_line_for_each_new_thing():
    assert shown(terminal=False, lines=False) == ""
    assert shown(terminal=False, lines=True) == "[1/2] checking\n[1/2] decoding\n"
