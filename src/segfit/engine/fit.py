"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.evaluate import evaluate
from segfit.engine.events import EndLog, EpochLog, EvalResult, Listener, Listeners, RunInfo, StepLog
from segfit.engine.seeding import derive_seed
from segfit.engine.signals import StopSignal
from segfit.engine.state import TrainingState
from segfit.engine.step import halve_micro_batch, make_update
from segfit.engine.task import Batch, Task, TrainingData
from segfit.errors import SegFitError
from segfit.hardware import peak_memory_gib


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


@dataclass
class _Window:
    """The updates since the last log: sums stay on the device until then."""

    loss: Tensor
    norm: Tensor
    updates: int
    images: int = 0
    waited: float = 0.0
    start: float = field(default_factory=time.perf_counter)


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
        self.listener: Listener = Listeners()
        self.stop = StopSignal()
        self.saved_at = time.monotonic()
        self.result: EvalResult | None = None
        self.images, self.waited = 0, 0.0  # of the epoch, for its log
        self.total_images, self.total_seconds = 0, 0.0  # of training, without validation

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
        self.listener = listener
        self.listener.start(self._info(facts))
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
        self.listener.end(end)
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
            self._tell_epoch(seconds, is_best=self._record(self.result))

            if progress.batch >= self.train.batches_per_epoch():
                progress.epoch, progress.batch = progress.epoch + 1, 0
                progress.loss_sum, progress.loss_count = 0.0, 0
            self._save()
            if self._out_of_steps():
                return "max_steps"
        return "finished"

    def _train_epoch(self) -> None:
        progress, options = self.state.progress, self.options
        window = self._open_window()
        batches = iter(self.train.epoch(progress.epoch, progress.batch))
        while not self._out_of_steps():
            waiting = time.perf_counter()
            micro_batches = list(islice(batches, options.accumulate))
            if not micro_batches:
                break
            window.waited += time.perf_counter() - waiting

            loss, norm = self._update(micro_batches)

            progress.batch += len(micro_batches)
            window.loss += loss
            if self.state.scaler.is_enabled():
                norm = norm.nan_to_num(0.0, 0.0, 0.0)  # of updates that the scaler skipped
            window.norm += norm
            window.updates += 1
            window.images += sum(len(batch["image"]) for batch in micro_batches)
            self.listener.step(progress.epoch, progress.update)
            if progress.update % options.log_every == 0:
                window = self._tell(window)
            if self.stop.reason is not None:
                self._keep(window)
                raise Stopped(self.stop.reason)
            if self._save_is_due():
                self._keep(window)
                self._save()
        self._tell(window)

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
            except torch.OutOfMemoryError:
                pass  # handled outside, where the traceback no longer holds the pass's tensors
            largest = max(len(batch["image"]) for batch in window)
            self.listener.notice(halve_micro_batch(self.state, largest))

    def _validate(self) -> EvalResult:
        def between(done: int) -> None:
            self.listener.validating(done, self.held_out_batches)
            if self.stop.reason is not None:
                raise Stopped(self.stop.reason)  # resuming validates again: no update is lost

        return evaluate(
            self.state.evaluated(), self.task, self.held_out(), self.state.precision, between
        )

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
        self.checkpoints.save_last(self.state.state_dict())  # synchronises: copies to the host
        self.saved_at = time.monotonic()

    # ----------------------------------------------------------------------------------- telling

    def _info(self, facts: Mapping[str, str]) -> RunInfo:
        updates = math.ceil(self.train.batches_per_epoch() / self.options.accumulate)
        total = updates * self.options.epochs
        progress = self.state.progress
        return RunInfo(
            epochs=self.options.epochs,
            updates_per_epoch=updates,
            start_epoch=progress.epoch,
            start_update=progress.update,
            total_updates=min(total, self.options.max_steps or total),
            facts=facts,
        )

    def _open_window(self) -> _Window:
        progress, device = self.state.progress, self.state.device
        return _Window(
            loss=torch.tensor(progress.window_loss, device=device),
            norm=torch.tensor(progress.window_norm, device=device),
            updates=progress.window_updates,
        )

    def _keep(self, window: _Window) -> None:
        """Read the window's sums from the device into the progress.

        Raises:
            SegFitError: if loss or gradient is not finite; what was saved last is from before.
        """
        progress = self.state.progress
        loss, norm = torch.stack([window.loss, window.norm]).tolist()  # synchronises
        if not math.isfinite(loss + norm):
            what = (
                f"gradient's norm became {norm}" if math.isfinite(loss) else f"loss became {loss}"
            )
            raise SegFitError(
                f"the {what} within the last {window.updates} updates (of {progress.update}). "
                f"{self.checkpoints.last} holds the last good state, if one was saved. Lower lr, keep "
                f"clip_grad_norm, or try precision=fp32."
            )
        progress.window_loss, progress.window_norm = loss, norm
        progress.window_updates = window.updates

    def _tell(self, window: _Window) -> _Window:
        """Log the means of the window and return a fresh one."""
        if window.updates == 0:
            return window
        self._keep(window)
        progress = self.state.progress
        seconds = time.perf_counter() - window.start
        scaler = self.state.scaler
        log = StepLog(
            epoch=progress.epoch,
            update=progress.update,
            loss=progress.window_loss / window.updates,
            lr=self._lr(),
            grad_norm=progress.window_norm / window.updates,
            loss_scale=scaler.get_scale() if scaler.is_enabled() else 1.0,  # synchronises
            images_per_second=window.images / seconds,
            data_wait=window.waited / seconds,
            memory_gib=peak_memory_gib(self.state.device),
        )
        self.images += window.images
        self.waited += window.waited
        progress.loss_sum += progress.window_loss
        progress.loss_count += window.updates
        progress.window_loss, progress.window_norm, progress.window_updates = 0.0, 0.0, 0
        self.listener.log(log)
        return self._open_window()

    def _lr(self) -> float:
        return float(self.state.optimizer.param_groups[0]["lr"])

    def _tell_epoch(self, training_seconds: float, is_best: bool) -> None:
        progress = self.state.progress
        log = EpochLog(
            epoch=progress.epoch,
            update=progress.update,
            loss=progress.loss_sum / max(progress.loss_count, 1),
            lr=self._lr(),
            images_per_second=self.images / training_seconds,
            data_wait=self.waited / training_seconds,
            memory_gib=peak_memory_gib(self.state.device),
            seconds=training_seconds + (self.result.seconds if self.result else 0.0),
            result=self.result,
            is_best=is_best,
        )
        self.total_images += self.images
        self.total_seconds += training_seconds
        self.images, self.waited = 0, 0.0
        self.listener.epoch(log)
