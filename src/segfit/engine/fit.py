"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

from torch import Tensor

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.evaluate import evaluate
from segfit.engine.events import EndLog, EvalResult, Listener
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.seeding import derive_seed
from segfit.engine.signals import StopSignal
from segfit.engine.state import TrainingState
from segfit.engine.step import halve_micro_batch, make_update
from segfit.engine.task import Batch, Task, TrainingData
from segfit.engine.telling import Teller, Window
from segfit.errors import SegFitError
from segfit.phases import phase


@dataclass(frozen=True)
class FitOptions:
    """How to train; every field is the config's option of the same name."""

    epochs: int
    accumulate: int = 1
    seed: int = 0
    clip_grad_norm: float | None = None
    val_every: int = 1
    monitor: str = "miou"
    patience: int | None = None
    max_steps: int | None = None
    log_every: int = 20
    every_minutes: float | None = None
    every_steps: int | None = None


class Stopped(Exception):  # noqa: N818 - not an error
    """The person or the scheduler asked the training to end; `args[0]` is the reason."""


class Fit:
    """Trains a state on a task's data, from wherever it stands, until a reason to stop.

    Args:
        state: model, optimizer and all that changes.
        task: what a batch means.
        train: training batches.
        held_out: gives the validation batches, a fresh pass each call; their number is `held_out_batches`.
        held_out_batches: number of validation batches.
        checkpoints: where to save.
        options: how to train.
    """

    def __init__(
        self,
        state: TrainingState,
        task: Task,
        train: TrainingData,
        held_out: Callable[[], Iterable[Batch]],
        held_out_batches: int,
        checkpoints: Checkpoints,
        options: FitOptions,
    ) -> None:
        self.state = state
        self.task = task
        self.train = train
        self.held_out = held_out
        self.held_out_batches = held_out_batches
        self.checkpoints = checkpoints
        self.options = options
        self.teller = Teller(state, checkpoints.last)
        self.stop = StopSignal()
        self.saved_at = time.monotonic()
        self.result: EvalResult | None = None

    def run(self, listener: Listener, facts: Mapping[str, str]) -> EndLog:
        """Train; return how it ended. The last state is saved, whatever the reason.

        Args:
            listener: hears how it goes.
            facts: what really runs, for the listeners.

        Raises:
            SegFitError: if nothing is left to train, the loss is no longer finite, or a single image does
                not fit.
        """
        self._refuse_if_over()
        start = time.perf_counter()
        self.teller.listener = listener
        updates = math.ceil(self.train.batches_per_epoch() / self.options.accumulate)
        self.teller.start(self.options.epochs, updates, self.options.max_steps, facts)
        with self.stop:
            try:
                reason = self._epochs()
            except Stopped as stopped:
                reason = str(stopped)
                self._save()
        progress = self.state.progress
        end = EndLog(
            reason=reason,
            updates=progress.update,
            best_scores=progress.best_scores,
            best_epoch=progress.best_epoch,
            seconds=time.perf_counter() - start,
        )
        listener.end(end)
        return end

    def _refuse_if_over(self) -> None:
        over = {
            "epochs": self.state.progress.epoch >= self.options.epochs,
            "max_steps": self._out_of_steps(),
            "patience": self._out_of_patience(),
        }
        for key in (key for key, reached in over.items() if reached):
            raise SegFitError(
                f"this run is over, nothing is left to train: {key}={getattr(self.options, key)} is "
                f"reached. To go on, raise {key}."
            )

    def _epochs(self) -> str:
        progress, options = self.state.progress, self.options
        while progress.epoch < options.epochs:
            if self._out_of_patience():
                return "patience"
            start = time.perf_counter()
            self.state.model.train()
            self._train_epoch()
            seconds = time.perf_counter() - start

            due = (progress.epoch + 1) % options.val_every == 0
            last = progress.epoch + 1 == options.epochs or self._out_of_steps()
            self.result = self._validate() if due or last else None
            is_best = self._record(self.result)
            with phase("logging"):
                self.teller.tell_epoch(seconds, self.result, is_best)

            if progress.batch >= self.train.batches_per_epoch():
                progress.epoch, progress.batch = progress.epoch + 1, 0
                progress.loss_sum, progress.loss_count = 0.0, 0
            self._save()
            if self._out_of_steps():
                return "max_steps"
        return "finished"

    def _train_epoch(self) -> None:
        progress, options = self.state.progress, self.options
        window = self.teller.open()
        batches = iter(self.train.epoch(progress.epoch, progress.batch))
        while not self._out_of_steps():
            waiting = time.perf_counter()
            with phase("data"):
                micro_batches = list(islice(batches, options.accumulate))
            if not micro_batches:
                break
            waited = time.perf_counter() - waiting

            loss, norm = self._update(micro_batches)

            progress.batch += len(micro_batches)
            if self.state.scaler.is_enabled():
                norm = norm.nan_to_num(0.0, 0.0, 0.0)  # of updates that the scaler skipped
            images = sum(len(batch["image"]) for batch in micro_batches)
            window.add(loss, norm, images, waited)
            window = self._log(window)
            if self.stop.reason is not None:
                self.teller.keep(window)
                raise Stopped(self.stop.reason)
            if self._save_is_due():
                self.teller.keep(window)
                self._save()
        with phase("logging"):
            self.teller.tell(window)

    def _update(self, window: list[Batch]) -> tuple[Tensor, Tensor]:
        first = self.state.progress.batch
        seeds = [
            derive_seed(self.options.seed, self.state.progress.epoch, first + offset)
            for offset in range(len(window))
        ]
        while True:
            try:
                return make_update(
                    self.state, self.task, window, seeds, self.options.clip_grad_norm
                )
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).partition("\n")[0]
            # Outside of the `except`, where the traceback no longer holds the pass's tensors.
            largest = max(len(batch["image"]) for batch in window)
            self.teller.listener.notice(halve_micro_batch(self.state, largest, said))

    def _log(self, window: Window) -> Window:
        """Tell the update; where it is time, also the window's means, and return a fresh one."""
        progress = self.state.progress
        with phase("logging"):
            self.teller.listener.step(progress.epoch, progress.update)
            if progress.update % self.options.log_every == 0:
                return self.teller.tell(window)
        return window

    def _validate(self) -> EvalResult:
        def between(done: int) -> None:
            self.teller.listener.validating(done, self.held_out_batches)
            if self.stop.reason is not None:
                raise Stopped(self.stop.reason)  # resuming validates again: no update is lost

        state = self.state
        with phase("validation", whole=True):
            return evaluate(state.evaluated(), self.task, self.held_out(), state.precision, between)

    def _record(self, result: EvalResult | None) -> bool:
        """Remember a validation; return whether it is the best so far, saving it if so."""
        if result is None:
            return False
        progress = self.state.progress
        score = result.scores[self.options.monitor]
        best = progress.best_score
        if math.isnan(score) or (best is not None and score <= best):
            progress.stale += 1
            return False
        progress.best_score, progress.best_scores = score, dict(result.scores)
        progress.best_epoch, progress.stale = progress.epoch, 0
        with phase("checkpoint"):
            self.checkpoints.save_best(
                self.state.evaluated().state_dict(), progress.best_scores, progress.epoch
            )
        return True

    # ------------------------------------------------------------------------- stopping, saving

    def _out_of_steps(self) -> bool:
        limit = self.options.max_steps
        return limit is not None and self.state.progress.update >= limit

    def _out_of_patience(self) -> bool:
        limit = self.options.patience
        return limit is not None and self.state.progress.stale >= limit

    def _save_is_due(self) -> bool:
        steps, minutes = self.options.every_steps, self.options.every_minutes
        if steps is not None and self.state.progress.update % steps == 0:
            return True
        return minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def _save(self) -> None:
        with phase("checkpoint"):
            self.checkpoints.save_last(self.state.state_dict())  # synchronises: copies to the host
        self.saved_at = time.monotonic()
