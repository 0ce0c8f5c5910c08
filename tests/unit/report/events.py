"""A synthetic training to listen to."""

import numpy as np

from segfit.engine.events import EndLog, EpochLog, EvalResult, Listener, Panel, RunInfo, StepLog
from segfit.tasks.segmentation.classes import Classes

CLASSES = Classes(("background", "liver", "kidney"), background=0)
UPDATES_PER_EPOCH = 4


def panel(name: str = "case_1", size: tuple[int, int] = (40, 60)) -> Panel:
    """Return a noise image whose left half is liver, with an ignored top row and a shifted prediction."""
    height, width = size
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[:, : width // 2] = 1
    prediction = np.roll(mask, 5, axis=1)
    mask[: height // 4] = 255
    return Panel(name, image, mask, prediction)


def result(miou: float = 0.5) -> EvalResult:
    """Return a validation in which the kidney is absent from the ground truth."""
    per_class = {"background": 0.9, "liver": miou, "kidney": None}
    return EvalResult(
        scores={
            "loss": 1 - miou,
            "miou": miou,
            "macro_f1": miou + 0.1,
            "pixel_accuracy": 0.95,
            "foreground_f1": float("nan"),
        },
        per_class={measure: dict(per_class) for measure in ("iou", "f1", "accuracy")},
        confusion=np.array([[90, 10, 0], [20, 60, 20], [0, 0, 0]], np.int64),
        panels=[panel()],
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
    )


def step_log(update: int) -> StepLog:
    epoch = (update - 1) // UPDATES_PER_EPOCH
    return StepLog(epoch, update, 1 / update, 3e-4, 1.25, 1.0, 45.3, 0.02, 3.25)


def epoch_log(epoch: int, is_best: bool = True, validated: bool = True) -> EpochLog:
    update = (epoch + 1) * UPDATES_PER_EPOCH
    scores = result(0.5 + 0.1 * epoch) if validated else None
    return EpochLog(epoch, update, 0.75, 3e-4, 45.3, 0.02, 3.25, 75.0, scores, is_best)


def end_log(updates: int, reason: str = "finished", best_epoch: int | None = 1) -> EndLog:
    scores = result(0.5 + 0.1 * best_epoch).scores if best_epoch is not None else {}
    return EndLog(reason, updates, scores, best_epoch, 83.0)


def train(listener: Listener, first: int = 0, last: int = 2 * UPDATES_PER_EPOCH) -> None:
    """Tell of the updates first+1 … last of a run of two epochs, in the loop's order."""
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
