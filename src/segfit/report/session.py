"""The listeners of one training run, and what is written when it ends."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.events import EndLog, Listener, Listeners
from segfit.errors import SegFitError
from segfit.report.files import write_json
from segfit.report.lines import LogFile
from segfit.report.scores_file import ScoresFile
from segfit.report.summary import print_summary
from segfit.report.text import monitored_first
from segfit.system.monitor import Monitor


class _Posted(Listener):
    """A listener that passes on the notices of other processes, each once, when the loop logs."""

    def __init__(
        self, posted: Callable[[], list[str]], listener: Listener, known: Sequence[str]
    ) -> None:
        self._posted, self._listener, self._known = posted, listener, set(known)

    def notice(self, message: str) -> None:
        self._known.add(message)

    def _pass_on(self, _event: object) -> None:
        for line in self._posted():
            if line not in self._known:
                self._known.add(line)
                self._listener.notice(line)

    start = log = epoch = end = _pass_on  # type: ignore[assignment]


class RunReport:
    """Console, log file and TensorBoard of a run; the log file also gets the notices that `console` printed so far."""

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
        """Also write TensorBoard events; logs a notice if they cannot be written."""
        folder = self.run / "tensorboard"
        notify = Listeners(self.console, self.log).notice
        try:
            from segfit.report.tensorboard import TensorBoardReport
        except Exception as error:  # not there, or at odds with protobuf or NumPy
            notify(
                f"TensorBoard cannot be imported ({type(error).__name__}: {error}): training goes on without it. "
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
        """Also pass on the notices of the other processes; what all of them found is passed on once."""
        self.parts.append(_Posted(posted, Listeners(self.console, self.log), self.notices))

    @property
    def listener(self) -> Listeners:
        """All of them."""
        return Listeners(*self.parts)

    def conclude(self, end: EndLog, metrics: Mapping[str, Any]) -> None:
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
            columns=monitored_first(metrics["monitor"], metrics["columns"]),
            run_dir=self.run,
            checkpoint=best if best.exists() else None,
            tensorboard_dir=self.tensorboard,
        )
