"""Losses and scores of a run as `curves.png`, drawn anew as it trains."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfit.engine.events import EndLog, EpochLog, Listener, RunInfo
from segfit.report.files import png
from segfit.system.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHARE = 0.02  # of the wall-clock time may go into drawing


class CurvesFile(Listener):
    """Draws the validations of a scores.jsonl, those of earlier sessions included, into a PNG file."""

    def __init__(self, scores: Path, path: Path) -> None:
        self._scores, self._path = scores, path
        self._columns: Mapping[str, str] = {}
        self._begun, self._drawing = time.monotonic(), 0.0
        self._old = False  # there are validations that are not drawn yet

    def start(self, info: RunInfo) -> None:
        """Take the names of the scores."""
        self._columns = info.columns

    def epoch(self, log: EpochLog) -> None:
        """Draw, as long as that takes next to no time."""
        self._old |= log.result is not None
        if self._old and self._drawing <= _SHARE * (time.monotonic() - self._begun):
            self._draw()

    def end(self, log: EndLog) -> None:
        """Draw what is new."""
        del log
        if self._old:
            self._draw()

    def _draw(self) -> None:
        begun = time.monotonic()
        with suppress(OSError):  # a full disk costs the picture, never the training
            content = png(lambda: curves(validations(self._scores), self._columns))
            with atomic_write(self._path, sync=False) as file:
                file.write(content)
        self._old = False
        self._drawing += time.monotonic() - begun


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
