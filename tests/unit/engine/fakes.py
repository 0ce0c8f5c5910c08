"""A loop in miniature: a linear model that learns a line, with scores written in advance."""

import math
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from segfit.engine.checkpoint import Checkpoints, load_checkpoint
from segfit.engine.events import EndLog, EpochLog, Listener, RunInfo, StepLog
from segfit.engine.findings import Findings
from segfit.engine.fit import Fit
from segfit.engine.optim import make_scheduler
from segfit.engine.precision import Precision
from segfit.engine.state import TrainingState
from segfit.engine.task import Batch, FitOptions, Forward

CPU = torch.device("cpu")


class Recorder(Listener):
    """A listener that keeps all it hears."""

    def __init__(self) -> None:
        self.infos: list[RunInfo] = []
        self.notices: list[str] = []
        self.steps: list[int] = []
        self.logs: list[StepLog] = []
        self.epochs: list[EpochLog] = []
        self.ends: list[EndLog] = []
        self.start = self.infos.append
        self.notice = self.notices.append
        self.log = self.logs.append
        self.epoch = self.epochs.append
        self.end = self.ends.append

    def step(self, epoch: int, update: int) -> None:
        self.steps.append(update)

    def began(self, batch: Batch, seed: int) -> None:
        pass

    def validating(self, done: int, total: int) -> None:
        assert 1 <= done <= total

    @property
    def losses(self) -> dict[int, float]:
        return {log.update: log.loss for log in self.logs}


class StopAt(Recorder):
    """Sends this process a signal after an update."""

    def __init__(self, update: int, number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.update, self.number = update, number

    def step(self, epoch: int, update: int) -> None:
        super().step(epoch, update)
        if update == self.update:
            os.kill(os.getpid(), self.number)


class LineTask:
    """Mean squared error; validation gives the next of `scores`, or minus the weights' error.

    Args:
        scores: one a validation.
        poison: update → factor on its loss.
    """

    memory_advice = "Buy more memory."

    def __init__(
        self, scores: Sequence[float] = (), poison: dict[int, float] | None = None
    ) -> None:
        self.scores = list(scores)
        self.poison = poison or {}
        self.validated: list[Tensor] = []
        self.seeds: list[int] = []
        self.losses = 0

    def prepare(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        self.seeds.append(seed)
        return batch["image"], batch["target"]

    def totals(self, targets: Tensor) -> Tensor:
        return torch.tensor([float(len(targets))])

    def loss(self, outputs: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        self.losses += 1
        error = (outputs.float() - targets).square().sum() / totals[0]
        return error * self.poison.get(self.losses, 1.0)

    def split(self, inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def meter(self) -> "LineMeter":
        return LineMeter(self)


class LineMeter:
    def __init__(self, task: LineTask) -> None:
        self.task = task
        self.outputs: list[Tensor] = []

    def update(self, forward: Forward, batch: Batch) -> None:
        self.outputs.append(forward(batch["image"]))

    def result(self) -> Findings:
        outputs = torch.cat(self.outputs)
        self.task.validated.append(outputs)
        score = self.task.scores.pop(0) if self.task.scores else -float(outputs.square().sum())
        return Findings(scores={"score": score, "loss": 0.0})


class Points:
    """Training batches of points on a line, a function of epoch and position alone.

    Args:
        batches: an epoch.
        size: points of each.
        bad: (epoch, batch) of those with a target that is not finite.
    """

    def __init__(
        self, batches: int = 4, size: int = 2, bad: Sequence[tuple[int, int]] = ()
    ) -> None:
        self.batches, self.size, self.bad = batches, size, bad

    def batches_per_epoch(self) -> int:
        return self.batches

    def batches_left(self, image: int) -> int:
        return self.batches - image // self.size

    def epoch(self, epoch: int, start_sample: int) -> Iterator[Batch]:
        for batch in range(start_sample // self.size, self.batches):
            made = points(self.size, 100 * epoch + batch)
            if (epoch, batch) in self.bad:
                made["target"][0] = math.nan
            yield made

    def names(self, batch: Batch) -> list[str]:
        return [f"point {value:.3f}" for value in batch["target"].flatten().tolist()]


class _SpoiltBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def spoilt_backward(x: Tensor, factor: float = math.nan) -> Tensor:
    """Return a copy whose gradient comes back times a factor that is not finite."""
    spoilt: Tensor = _SpoiltBackward.apply(x, factor)
    return spoilt


def points(count: int, seed: int) -> Batch:
    inputs = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return {"image": inputs, "target": inputs @ torch.tensor([[1.0], [-2.0], [0.5]])}


def make_state(
    *,
    lr: float = 0.05,
    scaler: torch.amp.GradScaler | None = None,
    ema: object = None,
    scheduler: str = "none",
    epochs: int = 3,
    model: nn.Module | None = None,
    dropout: float = 0.0,
) -> TrainingState:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Dropout(dropout), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    precision = Precision("fp32", "cpu")
    schedule = make_scheduler(
        optimizer,
        name=scheduler,
        updates_per_epoch=4,
        epochs=epochs,
        warmup=0.0,
        warmup_factor=0.01,
        min_factor=0.0,
        poly_power=0.9,
        step_epochs=30,
        step_gamma=0.1,
    )
    scaler = scaler or precision.scaler(1.0, 1)
    average = ema(model) if callable(ema) else None
    return TrainingState(model, model, optimizer, schedule, scaler, average, precision, CPU)


def make_fit(
    folder: Path,
    *,
    state: TrainingState | None = None,
    task: LineTask | None = None,
    train: Points | None = None,
    **options: object,
) -> Fit:
    held_out = [points(4, seed=12345)]
    return Fit(
        state or make_state(),
        task or LineTask(),
        train or Points(),
        lambda: held_out,
        len(held_out),
        Checkpoints(folder),
        FitOptions(**{"epochs": 3, "monitor": "score", "log_every": 1, **options}),
        folder.parent / "bad_batches",
    )


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def run(fit: Fit, recorder: Recorder | None = None) -> Recorder:
    """Train; return what was heard."""
    recorder = recorder or Recorder()
    fit.run(recorder, {"device": "toy"})
    return recorder


def resumed(folder: Path, fit: Fit) -> Fit:
    """Return a training where the last checkpoint of a folder left off."""
    fit.state.load_state_dict(load_checkpoint(folder / "last.pt"))
    return fit
