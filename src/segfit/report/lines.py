"""The training as plain lines: for a pipe, a batch system's output, a log file."""

import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from segfit.engine.events import EndLog, EpochLog, Listener, RunInfo, StepLog
from segfit.report.text import duration, number, one_line
from segfit.system.files import reporting

REASONS = {
    "finished": "all epochs are done",
    "max_steps": "max_steps is reached",
    "patience": "no new best for `patience` validations",
    "interrupted": "interrupted (Ctrl-C)",
    "terminated": "terminated (SIGTERM)",
}


class Eta:
    """Seconds left to the last update, from the mean pace so far, validation and saving included.

    The first update is left out: it pays for workers, kernels and compilation.
    """

    def __init__(self, total_updates: int) -> None:
        self._total = total_updates
        self._first: tuple[int, float] | None = None

    def seconds(self, update: int) -> float:
        """Return what is left after `update` updates; NaN as long as it is unknown."""
        now = time.monotonic()
        if self._first is None:
            self._first = (update, now)
        made, since = update - self._first[0], now - self._first[1]
        return (self._total - update) * since / made if made > 0 else float("nan")


class LineReport(Listener):
    """A listener that turns every event but `step` and `validating` into one line."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._info = RunInfo(0, 0, 0, 0, 0, {})
        self._eta = Eta(0)

    def start(self, info: RunInfo) -> None:
        """Write the facts, one a line, and where the training begins."""
        self._info = info
        self._eta = Eta(info.total_updates)
        for label, text in info.facts.items():
            self._emit(f"{label}: {one_line(text)}")
        begin = f"resuming at update {info.start_update}" if info.start_update else "training"
        self._emit(
            f"{begin}: {info.epochs} epochs of {info.updates_per_epoch} updates, "
            f"{info.total_updates} in all"
        )

    def notice(self, message: str) -> None:
        """Write the message as one line."""
        self._emit(f"notice: {one_line(message)}")

    def step(self, epoch: int, update: int) -> None:
        """Start the clock of the ETA at the first update; else nothing."""
        del epoch
        if update <= self._info.start_update + 1:
            self._eta.seconds(update)

    def log(self, log: StepLog) -> None:
        """Write the numbers of a step."""
        scale = f" scale {log.loss_scale:g}" if log.loss_scale != 1.0 else ""
        scale += f" ({log.skipped} skipped)" if log.skipped else ""
        self._emit(
            f"epoch {log.epoch + 1}/{self._info.epochs} update {log.update}/"
            f"{self._info.total_updates} loss {number(log.loss)} lr {log.lr:.3g} "
            f"grad {number(log.grad_norm, '.3g')}{scale} {log.samples_per_second:.1f} {self._info.unit}/s "
            f"wait {log.data_wait:.0%} {log.memory_gib:.2f} GiB "
            f"ETA {duration(self._eta.seconds(log.update))}"
        )

    def epoch(self, log: EpochLog) -> None:
        """Write the numbers of an epoch."""
        scores = ""
        if log.result is not None:
            scores = "".join(
                f" {label} {number(log.result.scores.get(name))}"
                for name, label in self._info.columns.items()
            )
        self._emit(
            f"epoch {log.epoch + 1}/{self._info.epochs} done: loss {number(log.loss)}{scores} "
            f"lr {log.lr:.3g} {log.samples_per_second:.1f} {self._info.unit}/s wait {log.data_wait:.0%} "
            f"{log.memory_gib:.2f} GiB {duration(log.seconds)}" + (" new best" * log.is_best)
        )

    def end(self, log: EndLog) -> None:
        """Write why and after how much the training ended."""
        self._emit(
            f"training ended after {log.updates} updates in {duration(log.seconds)}: "
            f"{REASONS.get(log.reason, log.reason)}"
        )


class LogFile(LineReport):
    """Appends the lines to a file, each with the local time; its folder is made, and a resumed run continues the file.

    Raises a SegFitError if the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        with reporting(f"{path}: cannot write the log file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Line-buffered: every line is on disk even if the process is killed.
            self._file = path.open("a", buffering=1, encoding="utf-8")
        super().__init__(self._write)

    def close(self) -> None:
        """Close the file; lines that come later are dropped."""
        with suppress(OSError):
            self._file.close()

    def _write(self, line: str) -> None:
        if not self._file.closed:
            # A full disk costs lines of the log, never the training.
            with suppress(OSError):
                self._file.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} {line}\n")
