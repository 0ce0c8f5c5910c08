"""The training loop: epochs of updates, validation, logging, checkpoints, and the reasons to stop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from segfit.engine.checkpoint import CheckpointManager, Checkpoints
from segfit.engine.evaluate import evaluate
from segfit.engine.events import EndLog, Listener, RunInfo
from segfit.engine.findings import Findings
from segfit.engine.logging import TrainingLog
from segfit.engine.recovery import Recovery
from segfit.engine.state import TrainingState
from segfit.engine.step import NotFinite, PartlyUpdated
from segfit.engine.task import Batch, FitOptions, Task, TrainingData, count_samples
from segfit.errors import SegFitError
from segfit.system.monitor import phase
from segfit.system.process import Stopped, StopSignal


@dataclass(eq=False)
class Fit:
    """Trains a state on a task's data, from its present progress until a reason to stop."""

    state: TrainingState
    task: Task
    train: TrainingData
    held_out: Callable[[], Iterable[Batch]]  # a fresh pass over the validation batches each call
    held_out_batches: int
    checkpoints: Checkpoints
    options: FitOptions
    bad_batches: Path  # folder for batches that are left out, since loss or gradient is not finite

    def __post_init__(self) -> None:
        state, checkpoints, options = self.state, self.checkpoints, self.options
        self.log = TrainingLog(state)
        notice, names = self.log.notice, self.train.names
        self.recovery = Recovery(
            state, self.task, checkpoints, names, options, notice, self.bad_batches
        )
        self.stop = StopSignal()
        self.manager = CheckpointManager(state, checkpoints, options, notice)
        self.result: Findings | None = None
        self._undefined = False  # the monitored score was NaN, and a notice said so

    def run(self, listener: Listener, facts: Mapping[str, str], **shown: Any) -> EndLog:
        """Train; return how it ended. The last state is saved, whatever the reason.

        `facts`, `unit` and `columns` are for the listener: fields of `RunInfo`. Raises a SegFitError if nothing is left to
        train, too many updates were not finite, a single sample does not fit, or the last state could not be saved.
        """
        over = self._over()
        if over is not None:
            key = "epochs" if over == "finished" else over
            raise SegFitError(
                f"this run is over, nothing is left to train: {key}={getattr(self.options, key)} is "
                f"reached. To continue, raise {key}."
            )
        start = time.perf_counter()
        self.log.listener = listener
        updates_per_epoch, total = self._align_schedule()
        listener.start(
            RunInfo(
                epochs=self.options.epochs,
                updates_per_epoch=updates_per_epoch,
                start_epoch=self.state.progress.epoch,
                start_update=self.state.progress.update,
                total_updates=min(total, self.options.max_steps or total),
                facts=facts,
                **shown,
            )
        )
        with self.stop:
            if self.state.progress.update == 0:
                self._save_start()
            try:
                while (reason := self._over()) is None:
                    try:
                        self._run_epoch()
                    except (NotFinite, PartlyUpdated) as found:
                        self.recovery.roll_back(found)
            except Stopped as stopped:
                reason = str(stopped)
                self.manager.save_final()
            self.manager.retry_failed()
        end = self._end(reason, time.perf_counter() - start)
        listener.end(end)
        if self.manager.unsaved is not None:
            raise SegFitError(f"the training ended ({reason}), but {self.manager.unsaved}")
        return end

    def ended(self) -> EndLog | None:
        """Return how a training that has nothing left to do ended, None if something is left."""
        over = self._over()
        return None if over is None else self._end(over, 0.0)

    def _end(self, reason: str, seconds: float) -> EndLog:
        progress = self.state.progress
        return EndLog(reason, progress.update, progress.best_scores, progress.best_epoch, seconds)

    def _align_schedule(self) -> tuple[int, int]:
        """Set the schedule to the present epoch, also if batches had another size before the run was resumed.

        Returns the updates per epoch, and the updates in all, those before included.
        """
        state, progress, options = self.state, self.state.progress, self.options
        per_epoch = math.ceil(self.train.batches_per_epoch() / options.accumulate)
        in_epoch = max(self.train.batches_left(progress.sample), 0) / options.accumulate
        # Updates that would have been made with batches of the present size.
        made = (progress.epoch + 1) * per_epoch - math.ceil(in_epoch)
        state.schedule_offset = made - progress.update
        state.scheduler.step_update(made)
        return per_epoch, options.epochs * per_epoch - state.schedule_offset

    def _save_start(self) -> None:
        """Save what a roll-back loads; it also shows that the disk can be written before hours of work depend on it."""
        try:
            self._save()
        except NotFinite as found:
            raise SegFitError(
                f"the {found} before the first update: the weights that training starts from are damaged "
                f"(model.weights)."
            ) from found

    def _run_epoch(self) -> None:
        progress, options = self.state.progress, self.options
        start = time.perf_counter()
        self.state.train()
        self._train_epoch()
        seconds = time.perf_counter() - start

        self.state.average_buffers()
        due = (progress.epoch + 1) % options.val_every == 0
        last = progress.epoch + 1 == options.epochs or self._out_of_steps()
        self.result = self._validate() if due or last else None
        is_best = self._record(self.result)
        with phase("logging"):
            self.log.log_epoch(seconds, self.result, is_best)

        if self.train.batches_left(progress.sample) <= 0:
            progress.epoch, progress.sample = progress.epoch + 1, 0
            progress.loss_sum, progress.loss_count = 0.0, 0
        self._save()

    def _train_epoch(self) -> None:
        progress, options = self.state.progress, self.options
        self.log.begin_epoch()
        batches = iter(self.train.epoch(progress.epoch, progress.sample))
        while not self._out_of_steps():
            waiting = time.perf_counter()
            with phase("data"), self._saving_on_error():
                micro_batches = list(islice(batches, options.accumulate))
            if not micro_batches:
                break
            waited = time.perf_counter() - waiting

            samples = sum(map(count_samples, micro_batches)) * self.state.distributed.size
            update = self.recovery.update(micro_batches)  # see step.make_update
            if update is not None:
                self.log.add(*update, samples, waited)
            if progress.update == 1:
                seed, *_ = self.recovery.seeds(micro_batches)
                self.log.listener.began(micro_batches[0], seed)
            progress.sample += samples
            with phase("logging"):
                self.log.listener.step(progress.epoch, progress.update)
                if progress.update % options.log_every == 0:
                    self.log.log()  # synchronises
            self._stop_or_save()
        with phase("logging"):
            self.log.log()  # synchronises

    @contextmanager
    def _saving_on_error(self) -> Iterator[None]:
        """Save the state if reading data fails or a signal ends it: between two updates it is whole."""
        self.stop.at_once = self.state.distributed.size == 1
        try:
            yield
        except Stopped:
            self.log.to_progress()
            raise
        except Exception:
            if self.state.distributed.size == 1:  # several cannot save without the one that failed
                with suppress(NotFinite):
                    self.log.to_progress()
                    self.manager.save_final()
            raise
        finally:
            self.stop.at_once = False

    def _validate(self) -> Findings:
        state = self.state

        def on_batch(done: int) -> None:
            self.log.listener.validating(done, self.held_out_batches)
            if self.stop.reason is not None and state.distributed.size == 1:
                raise Stopped(self.stop.reason)

        def lowered(size: int, notice: str) -> None:
            state.progress.held_out_batch = size
            self.log.notice(notice)

        # Resuming validates again, so no update is lost. Several processes have different numbers of batches, and cannot
        # agree in between.
        self.stop.at_once = state.distributed.size == 1
        try:
            with phase("validation", whole=True):
                return evaluate(
                    state.evaluated(),
                    self.task,
                    self.held_out(),
                    state.precision,
                    on_batch,
                    largest=state.progress.held_out_batch,
                    lowered=lowered,
                )
        finally:
            self.stop.at_once = False

    def _record(self, result: Findings | None) -> bool:
        """Remember a validation; return whether it is the best so far, saving it if so."""
        if result is None:
            return False
        progress = self.state.progress
        score = result.scores.get(self.options.monitor, math.nan)
        if math.isnan(score):
            if not self._undefined:
                self.log.notice(
                    f"monitor={self.options.monitor} has no value in this validation (NaN): the held-out samples do not decide "
                    f"it. Such a validation picks no best checkpoint and does not count for patience."
                )
            self._undefined = True
            return False
        sign, best = -1 if self.options.monitor_mode == "min" else 1, progress.best_score
        if best is not None and sign * score <= sign * best:
            progress.stale += 1
            return False
        with phase("checkpoint"):
            if not self.manager.save_best(result):
                return False  # so that the next better one is saved
        progress.best_score, progress.best_scores = score, dict(result.scores)
        progress.best_epoch, progress.stale = progress.epoch, 0
        return True

    def _over(self) -> str | None:
        """Return why the training is over, as `EndLog.reason`, or None."""
        progress, options = self.state.progress, self.options
        if self._out_of_steps():
            return "max_steps"
        if progress.epoch >= options.epochs:
            return "finished"
        return "patience" if progress.stale >= (options.patience or math.inf) else None

    def _out_of_steps(self) -> bool:
        return self.state.progress.update >= (self.options.max_steps or math.inf)

    def _stop_or_save(self) -> None:
        """Stop if a signal asked any process to; save if that is due in any process."""
        asked = int(self.stop.reason is not None)
        stop, save = self.state.distributed.max(asked, int(self.manager.is_due()))
        if stop or save:
            self.log.to_progress()  # synchronises
        if stop:
            raise Stopped(self.stop.reason or "terminated")  # where another process was asked
        if save:
            self._save()

    def _save(self) -> None:
        with phase("checkpoint"):
            self.manager.save()
