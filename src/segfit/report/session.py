"""The listeners of one training run, and what is left when it is over."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.events import EndLog, Listener, Listeners
from segfit.errors import SegFitError
from segfit.report.files import write_json
from segfit.report.lines import LogFile
from segfit.report.scores_file import ScoresFile
from segfit.report.summary import print_summary
from segfit.system.monitor import Monitor


class PreflightProgress:
    """A bar while a data set is checked or decoded; nothing where there is no terminal."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int, what: str = "checking the data set") -> None:
        """Show that `done` of `total` files were looked at, and what for."""
        if self._bar is None:
            self._bar = Progress(transient=True)
            self._bar.start()
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Others:
    """A `Listener` that passes on what other processes posted, once, when the loop logs.

    Args:
        posted: returns the lines that came since the last call.
        notify: tells a line.
        told: lines that were told already.
    """

    def __init__(
        self, posted: Callable[[], list[str]], notify: Callable[[str], None], told: Sequence[str]
    ) -> None:
        self._posted = posted
        self._notify = notify
        self._told = set(told)

    def _pass_on(self, _log: object = None) -> None:
        for line in self._posted():
            if line not in self._told:
                self.notice(line)
                self._notify(line)

    start = log = epoch = end = _pass_on

    def notice(self, message: str) -> None:
        """Remember what the main process tells itself."""
        self._told.add(message)

    def step(self, epoch: int, update: int) -> None:
        """Nothing."""

    def validating(self, done: int, total: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class RunReport:
    """Console, log file and TensorBoard of a run.

    Args:
        run: the run's folder.
        console: listens already, to notices.
        notices: what it was told so far; the log file gets it too.
    """

    def __init__(self, run: Path, console: Listener, notices: list[str]) -> None:
        self.run = run
        self.notices = notices
        self.log = LogFile(run / "train.log")
        for notice in notices:
            self.log.notice(notice)
        self.console = console
        self.parts: list[Listener] = [console, self.log, ScoresFile(run / "scores.jsonl")]
        self.tensorboard: Path | None = None

    def add_tensorboard(
        self,
        config_text: str,
        hparams: Mapping[str, str | float | bool],
        resume_step: int | None,
    ) -> None:
        """Also write TensorBoard events; a folder that cannot be written to is told, and done without."""
        folder = self.run / "tensorboard"
        notify = Listeners(self.console, self.log).notice
        try:
            from segfit.report.tensorboard import TensorBoardReport
        except Exception as error:  # not there, or at odds with protobuf or NumPy
            notify(
                f"TensorBoard cannot be imported ({type(error).__name__}: {error}): going on without. "
                f"pip install tensorboard, or set report.tensorboard=false."
            )
            return
        try:
            report = TensorBoardReport(
                folder, config_text, hparams, resume_step, Monitor(), notify=notify
            )
        except SegFitError as error:
            for problem in error.problems:
                notify(problem)
            return
        self.parts.append(report)
        self.tensorboard = folder

    def add_others(self, posted: Callable[[], list[str]]) -> None:
        """Also tell what other processes of this training posted; what all of them found is told once."""
        self.parts.append(_Others(posted, Listeners(self.console, self.log).notice, self.notices))

    @property
    def listener(self) -> Listeners:
        """All of them."""
        return Listeners(*self.parts)

    def conclude(self, end: EndLog, monitor: str, metrics: Mapping[str, Any]) -> None:
        """Write metrics.json and print what to type next.

        Raises:
            SegFitError: if metrics.json cannot be written.
        """
        path = self.run / "metrics.json"
        try:
            write_json(path, metrics)
        except OSError as error:
            raise SegFitError(f"cannot write {path}: {error.strerror}.") from error
        best = Checkpoints(self.run / "checkpoints").best
        print_summary(
            end,
            monitor=monitor,
            run_dir=self.run,
            checkpoint=best if best.exists() else None,
            tensorboard_dir=self.tensorboard,
        )
