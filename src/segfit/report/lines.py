"""The training as lines: for a pipe, train.log, scores.jsonl; and `curves.png`, which is drawn of them."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfit.engine.events import EndLog, EpochLog, Listener, RunInfo, StepLog
from segfit.report.files import json_text, png
from segfit.report.text import duration, number, one_line
from segfit.system.files import atomic_write, reporting

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.02  # of the wall-clock time may go into drawing, while the device is idle

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
        scores = log.result.scores if log.result is not None else {}
        shown = "".join(
            f" {label} {number(scores.get(name))}" for name, label in self._info.columns.items()
        )
        self._emit(
            f"epoch {log.epoch + 1}/{self._info.epochs} done: loss {number(log.loss)}{shown if scores else ''} "
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


class Pictures(Listener):
    """Draws the first and the last validation, and those between as long as that takes next to no time."""

    def __init__(self) -> None:
        self._undrawn: EpochLog | None = None
        self._begun, self._drawing = time.monotonic(), 0.0

    def draw(self, log: EpochLog) -> None:
        """Draw a validation."""

    def epoch(self, log: EpochLog) -> None:
        """Draw, if there is time."""
        if log.result is not None:
            self._undrawn = log
            if self._drawing <= _SHARE * (time.monotonic() - self._begun):
                self._draw()

    def end(self, log: EndLog) -> None:
        """Draw what is new."""
        del log
        self._draw()

    def _draw(self) -> None:
        if self._undrawn is not None:
            begun = time.monotonic()
            self.draw(self._undrawn)
            self._undrawn = None
            self._drawing += time.monotonic() - begun


class ScoresFile(Pictures):
    """Appends a line of JSON for each validation: for a tuner that ends hopeless runs early, a plot, a notebook.

    A line holds `epoch` (0-based), `update`, `best` (whether no validation before was better) and `scores`
    (name → number, null where undefined), and of training `train_loss`, `lr` and `seconds`. A run that was killed
    validates some epochs again: of two lines of an epoch the later one counts. All of them, those of earlier sessions
    included, are drawn to `curves`, unless that is None.
    """

    def __init__(self, path: Path, curves: Path | None) -> None:
        super().__init__()
        self._path, self._curves = path, curves
        self._columns: Mapping[str, str] = {}

    def start(self, info: RunInfo) -> None:
        """Take the names of the scores."""
        self._columns = info.columns

    def epoch(self, log: EpochLog) -> None:
        """Append the epoch's scores, if it was validated, and draw."""
        if log.result is not None:
            line = {
                "epoch": log.epoch,
                "update": log.update,
                "best": log.is_best,
                "scores": log.result.scores,
                "train_loss": log.loss,
                "lr": log.lr,
                "seconds": log.seconds,
            }
            # Opened each time: a line is written whole, and is there for other programs to read.
            with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                file.write(json_text(line, indent=None) + "\n")
        super().epoch(log)

    def draw(self, log: EpochLog) -> None:
        """Draw all lines."""
        del log
        with suppress(OSError):  # a full disk costs the picture, never the training
            if self._curves is not None:
                content = png(lambda: curves(validations(self._path), self._columns))
                with atomic_write(self._curves, sync=False) as file:
                    file.write(content)


def validations(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a scores.jsonl, one an epoch, in order."""
    by_epoch: dict[int, dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):  # a full disk cut the line off
            line = json.loads(text)
            by_epoch[line["epoch"]] = line
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def curves(lines: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> "Figure":
    """Draw losses, the scores of `columns` and the learning rate over epochs; the best epoch is marked."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.4), dpi=100, layout="constrained")
    epochs, scores = [line["epoch"] + 1 for line in lines], [line["scores"] for line in lines]
    groups: list[dict[str, list[Any]]] = [
        {
            "training loss": [line.get("train_loss") for line in lines],
            "validation loss": [one.get("loss") for one in scores],
        },
        {label: [one.get(name) for one in scores] for name, label in columns.items()},
        {"learning rate": [line.get("lr") for line in lines]},
    ]
    best = [line["epoch"] + 1 for line in lines if line["best"]][-1:]
    for axes, group in zip(figure.subplots(1, 3), groups, strict=True):
        for label, values in group.items():
            if any(value is not None for value in values):
                axes.plot(epochs, np.array(values, float), "o-", markersize=3, label=label)
        for epoch in best:
            axes.axvline(epoch, color="#888888", linewidth=0.8, linestyle="--", label="best")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    return figure
