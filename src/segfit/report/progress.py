"""A bar for work that is no training: checking data, predicting, measuring."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class WorkProgress:
    """A bar that is removed when the work is done; on a stream that is no terminal, nothing, or with `lines` a line for each new thing."""

    def __init__(self, console: Console, *, lines: bool = False) -> None:
        self._console = console
        self._lines = lines
        self._what = ""
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None)
        self._done = 0

    def __call__(self, done: int, total: int, what: str = "checking the data set") -> None:
        """Show that `done` of `total` are done, and what the work is."""
        if not self._console.is_terminal:
            if self._lines and what != self._what:
                self._console.print(f"[{done + 1}/{total}] {what}", markup=False)
            self._what = what
            return
        if done < self._done:
            self._bar.reset(self._task)
        self._done = done
        self._bar.start()
        self._bar.update(self._task, description=what, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar.live.is_started:
            self._bar.stop()
