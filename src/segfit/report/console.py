"""What the terminal shows: a training, how it ended, and other work that takes a while."""

import time
from collections.abc import Mapping, Sequence
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
from rich.text import Text

from segfit.engine.events import EndLog, EpochLog, Listener, RunInfo, StepLog
from segfit.report.lines import REASONS, Eta, LineReport
from segfit.report.page import next_commands
from segfit.report.text import duration, number, one_line, scores_text, shown_path
from segfit.runs.files import RunFolder

_REDRAW_SECONDS = 0.1
_SMALLEST_BAR = 8


def console_report(console: Console) -> Listener:
    """Return the listener that suits the output: a bar for a terminal, else one line a record."""
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveReport(console)
    return LineReport(partial(console.print, markup=False, highlight=False, soft_wrap=True))


class LiveReport(Listener):
    """A listener with one progress bar over all updates and a table that grows by a line an epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._info = RunInfo(0, 0, 0, 0, 0, {})
        self._eta = Eta(0)
        self._update, self._drawn_at = 0, 0.0
        parts = (
            "[bold]{task.description}",
            BarColumn(None),
            MofNCompleteColumn(),
            "{task.fields[numbers]}",
        )
        self._progress = Progress(*parts, console=console, expand=True, transient=True)
        self._task = self._progress.add_task("", total=None, numbers="")
        self._scores: list[str] = []  # of the epoch table
        self._widths: list[int] = []
        self._fields = {"loss": "", "score": "", "speed": "", "memory": "", "wait": "", "eta": ""}

    def start(self, info: RunInfo) -> None:
        """Print the facts and the head of the epoch table, and show the bar."""
        self._info = info
        self._eta = Eta(info.total_updates)
        self._update = info.start_update
        room = max(map(len, info.facts), default=0)
        for label, text in info.facts.items():
            facts = Text.assemble((f"{label:{room}}", "dim"), f"  {text}")
            self._console.print(facts, soft_wrap=True)
        self._console.print()
        self._print_row(self._head(), style="bold")
        self._progress.update(self._task, total=info.total_updates)
        self._redraw(self._epoch_name(info.start_epoch))
        self._progress.start()

    def _head(self) -> list[str]:
        """Decide on the columns of the epoch table; return their titles. A narrow terminal shows fewer scores."""
        titles, info = list[str](), self._info
        for count in range(max(len(info.columns), 1), 0, -1):
            self._scores = list(info.columns)[:count]
            labels = [info.columns[name] for name in self._scores]
            titles = ["epoch", "loss", *labels, "lr", f"{info.unit}/s", "wait", "memory", "time"]
            least = [8, 8, *(7 for _ in labels), 8, 7, 5, 9, 7]
            self._widths = [max(len(text), room) for text, room in zip(titles, least, strict=True)]
            if sum(self._widths) + len(titles) < self._console.width:
                break
        return titles

    def notice(self, message: str) -> None:
        """Print the message above the bar, as one line."""
        text = Text.assemble(("! ", "bold yellow"), (one_line(message), "yellow"))
        self._console.print(text, soft_wrap=True)

    def step(self, epoch: int, update: int) -> None:
        """Move the bar, at most ten times a second."""
        self._update = update
        if time.monotonic() - self._drawn_at >= _REDRAW_SECONDS:
            self._redraw(self._epoch_name(epoch))

    def log(self, log: StepLog) -> None:
        """Show the numbers in the bar."""
        self._update = log.update
        self._fields |= {
            "loss": f"loss {number(log.loss)}",
            "speed": f"{log.samples_per_second:.1f} {self._info.unit}/s",
            "memory": f"{log.memory_gib:.1f} GiB",
            "wait": f"wait {log.data_wait:.0%}",
        }
        self._redraw(self._epoch_name(log.epoch))

    def validating(self, done: int, total: int) -> None:
        """Show how far the validation is, in the place of the epoch."""
        self._redraw(f"val {done}/{total}")

    def epoch(self, log: EpochLog) -> None:
        """Print the line of the epoch above the bar; a star marks a new best."""
        scores = log.result.scores if log.result is not None else {}
        for name in [name for name in self._scores[:1] if name in scores]:
            self._fields["score"] = f"{self._info.columns[name]} {number(scores[name], '.3f')}"
        cells = [
            f"{log.epoch + 1}/{self._info.epochs}",
            number(log.loss),
            *(number(scores.get(name)) for name in self._scores),
            f"{log.lr:.2e}",
            f"{log.samples_per_second:.1f}",
            f"{log.data_wait:.0%}",
            f"{log.memory_gib:.2f} GiB",
            duration(log.seconds),
        ]
        star = " *" if self._console.options.ascii_only else " ★"
        self._print_row(cells, star * log.is_best)
        self._redraw(self._epoch_name(min(log.epoch + 1, self._info.epochs - 1)))

    def close(self) -> None:
        """Remove the bar and show the cursor again."""
        if self._progress.live.is_started:
            self._progress.stop()

    def _epoch_name(self, epoch: int) -> str:
        return f"epoch {epoch + 1}/{self._info.epochs}"

    def _print_row(self, cells: Sequence[str], star: str = "", style: str = "") -> None:
        row = " ".join(f"{cell:>{width}}" for cell, width in zip(cells, self._widths, strict=True))
        text = Text.assemble((row, style), (star, "bold green"))
        self._console.print(text, no_wrap=True, overflow="ellipsis")

    def _redraw(self, description: str) -> None:
        self._drawn_at = time.monotonic()
        self._fields["eta"] = f"ETA {duration(self._eta.seconds(self._update))}"
        # What fits beside the bar: the least wanted goes first on a narrow terminal.
        shown = {name: text for name, text in self._fields.items() if text}
        count = 2 * len(str(self._info.total_updates)) + 1
        room = self._console.width - len(description) - count - _SMALLEST_BAR - 3
        for name in ("memory", "wait", "speed", "score"):
            if sum(len(text) + 2 for text in shown.values()) > room:
                shown.pop(name, None)
        numbers = "  ".join(shown.values())
        self._progress.update(
            self._task, completed=self._update, description=description, numbers=numbers
        )


def print_summary(
    end: EndLog, *, columns: Mapping[str, str], remark: str, files: RunFolder, console: Console
) -> None:
    """Print how the training ended, its best score, a remark on it, and the commands to type next.

    Every command is one line that can be pasted into a shell; paths below the working directory are relative to it.
    """
    reason = REASONS.get(end.reason, end.reason)
    lines = ["", f"Ended after {end.updates} updates, {duration(end.seconds)}: {escape(reason)}."]
    if end.best_epoch is not None:
        best = escape(scores_text(end.best_scores, columns))
        lines += [f"[bold]Best: {best}[/bold] (epoch {end.best_epoch + 1})"]
        lines += [escape(remark)] if remark else []
    else:
        lines += ["No validation gave the monitored score a value, so there is no best checkpoint."]
    places = {"Checkpoint": files.best, "Report": files.page}
    lines += [f"{what}: {escape(shown_path(one))}" for what, one in places.items() if one.exists()]
    lines += ["", "Next:"]
    lines += [f"  [cyan]{escape(command)}[/cyan]" for command in next_commands(end.reason, files)]
    for line in lines:  # neither wrapped nor coloured by content, so that commands can be copied
        console.print(line, soft_wrap=True, highlight=False)


class WorkProgress:
    """A bar for work that is no training, removed when it is done: checking data, predicting, measuring.

    On a stream that is no terminal, nothing, or with `lines` a line for each new thing.
    """

    def __init__(self, console: Console, *, lines: bool = False) -> None:
        self._console, self._lines, self._what = console, lines, ""
        parts = "{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._bar = Progress(*parts, console=console, transient=True)
        self._task = self._bar.add_task("", total=None)

    def __call__(self, done: int, total: int, what: str = "checking the data set") -> None:
        """Show that `done` of `total` are done, and what the work is."""
        if not self._console.is_terminal:
            if self._lines and what != self._what:
                self._console.print(f"[{done + 1}/{total}] {what}", markup=False)
            self._what = what
            return
        if done < self._bar.tasks[0].completed:
            self._bar.reset(self._task)
        self._bar.start()
        self._bar.update(self._task, description=what, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar.live.is_started:
            self._bar.stop()
