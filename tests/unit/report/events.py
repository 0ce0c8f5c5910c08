"""A synthetic training to listen to."""

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from segfit.engine.events import EndLog, EpochLog, Listener, RunInfo, StepLog
from segfit.engine.findings import Column, Findings, Table

UPDATES_PER_EPOCH = 4
COLUMNS = {"miou": "mIoU", "macro_f1": "macro F1", "foreground_f1": "foreground F1"}


def figure() -> Figure:
    """Draw a line."""
    drawn = Figure(figsize=(3, 2))
    drawn.add_subplot().plot([1, 3, 2])
    return drawn


def picture() -> NDArray[np.uint8]:
    """Draw noise."""
    return np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def result(miou: float = 0.5) -> Findings:
    """Return a validation with a score that is undefined and one that is absent."""
    rows = [["[liver]", miou, 1234567], ["kidney", None, 0]]
    return Findings(
        scores={
            "loss": 1 - miou,
            "miou": miou,
            "macro_f1": miou + 0.1,
            "pixel_accuracy": 0.95,
            "foreground_f1": float("nan"),
        },
        tables=[
            Table(
                "per_class",
                "",
                [Column("class"), Column("IoU", ".4f"), Column("pixels", ",")],
                rows,
                totals=[["mean", miou, ""]],
                colors=[(255, 0, 0), (0, 255, 0)],
                caption="pixel accuracy 0.9500",
            )
        ],
        figures={"confusion_matrix": figure},
        scalars={"score_iou/liver": miou, "score_iou/kidney": None},
        panels={"case_1": picture},
        seconds=1.5,
    )


def info(epochs: int = 2, start_update: int = 0) -> RunInfo:
    return RunInfo(
        epochs=epochs,
        updates_per_epoch=UPDATES_PER_EPOCH,
        start_epoch=start_update // UPDATES_PER_EPOCH,
        start_update=start_update,
        total_updates=epochs * UPDATES_PER_EPOCH,
        facts={"device": "cpu [2 cores]", "weights": "random | none"},
        unit="img",
        columns=COLUMNS,
    )


def step_log(update: int) -> StepLog:
    epoch = (update - 1) // UPDATES_PER_EPOCH
    return StepLog(epoch, update, 1 / update, 3e-4, 45.3, 0.02, 3.25, 1.25, 1.0)


def epoch_log(epoch: int, is_best: bool = True, validated: bool = True) -> EpochLog:
    update = (epoch + 1) * UPDATES_PER_EPOCH
    scores = result(0.5 + 0.1 * epoch) if validated else None
    return EpochLog(epoch, update, 0.75, 3e-4, 45.3, 0.02, 3.25, 75.0, scores, is_best)


def end_log(updates: int, reason: str = "finished", best_epoch: int | None = 1) -> EndLog:
    scores = result(0.5 + 0.1 * best_epoch).scores if best_epoch is not None else {}
    return EndLog(reason, updates, scores, best_epoch, 83.0)


def train(listener: Listener, first: int = 0, last: int = 2 * UPDATES_PER_EPOCH) -> None:
    """Send the events of updates first+1 … last of a run of two epochs, in the loop's order."""
    listener.start(info(start_update=first))
    for update in range(first + 1, last + 1):
        epoch = (update - 1) // UPDATES_PER_EPOCH
        listener.step(epoch, update)
        if update % 2 == 0:
            listener.log(step_log(update))
        if update % UPDATES_PER_EPOCH == 0:
            listener.validating(1, 2)
            listener.validating(2, 2)
            listener.epoch(epoch_log(epoch))
