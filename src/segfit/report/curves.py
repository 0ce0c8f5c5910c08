"""The validations of a run: a line of scores.jsonl for each, and `curves.png`, drawn anew as it trains."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfit.engine.events import EndLog, EpochLog, Listener, RunInfo
from segfit.report.files import json_text, png
from segfit.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.02  # of the wall-clock time may go into drawing, while the device is idle


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
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    by_epoch = {line["epoch"]: line for line in lines}
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def curves(lines: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> "Figure":
    """Draw losses, the scores of `columns` and the learning rate over epochs; the best epoch is marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 3.4), dpi=100, layout="constrained")
    epochs = [line["epoch"] + 1 for line in lines]
    groups: list[dict[str, list[Any]]] = [
        {
            "training loss": [line.get("train_loss") for line in lines],
            "validation loss": [line["scores"].get("loss") for line in lines],
        },
        {
            label: [line["scores"].get(name) for line in lines]
            for name, label in columns.items()
            if any(line["scores"].get(name) is not None for line in lines)
        },
        {"learning rate": [line.get("lr") for line in lines]},
    ]
    best = [line["epoch"] + 1 for line in lines if line["best"]][-1:]
    for axes, group in zip(figure.subplots(1, 3), groups, strict=True):
        for label, values in group.items():
            shown = [float("nan") if value is None else value for value in values]
            axes.plot(epochs, shown, "o-", markersize=3, label=label)
        for epoch in best:
            axes.axvline(epoch, color="#888888", linewidth=0.8, linestyle="--", label="best")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(color="#eeeeee")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8)
    return figure
