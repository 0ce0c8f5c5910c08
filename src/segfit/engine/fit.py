"""The training loop."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from types import MappingProxyType

from segfit.engine.checkpoint import Checkpoints
from segfit.engine.evaluate import evaluate
from segfit.engine.events import EndLog, Listener
from segfit.engine.findings import Findings
from segfit.engine.logging import Teller, Window
from segfit.engine.non_finite import NotFinite
from segfit.engine.recovery import Recovery
from segfit.engine.saving import Saver
from segfit.engine.signals import StopSignal
from segfit.engine.state import TrainingState
from segfit.engine.task import Batch, Task, TrainingData, count_samples
from segfit.engine.updating import Updater
from segfit.errors import SegFitError
from segfit.system.phases import phase


@dataclass(frozen=True)
class FitOptions:
    """How to train; every field is the config's option of the same name."""

    epochs: int
    accumulate: int = 1
    seed: int = 0
    clip_grad_norm: float | None = None
    val_every: int = 1
    monitor: str = "miou"
    monitor_mode: str = "max"
    patience: int | None = None
    max_steps: int | None = None
    max_left_out: int = 5
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
        self.teller = Teller(state)
        self.recovery = Recovery(state, checkpoints, options.max_left_out)
        self.updater = Updater(
            state,
            task,
            self.recovery,
            train.names,
            seed=options.seed,
            clip_grad_norm=options.clip_grad_norm,
            notice=self.teller.notice,
        )
        self.stop = StopSignal()
        self.saver = Saver(
            state, checkpoints, options.every_steps, options.every_minutes, self.teller.notice
        )
        self.result: Findings | None = None

    def run(
        self,
        listener: Listener,
        facts: Mapping[str, str],
        unit: str = "sample",
        columns: Mapping[str, str] = MappingProxyType({}),
    ) -> EndLog:
        """Train; return how it ended. The last state is saved, whatever the reason.

        Args:
            listener: hears how it goes.
            facts: what really runs, for the listeners.
            unit: what a sample is called, for the listeners.
            columns: score name → label, for the listeners.

        Raises:
            SegFitError: if nothing is left to train, too many updates were not finite, a single sample does not fit,
                or the last state could not be saved.
        """
        self._refuse_if_over()
        start = time.perf_counter()
        self.teller.listener = listener
        self._tell_start(facts, unit, columns)
        with self.stop:
            if self.state.progress.update == 0:
                self._save_start()
            try:
                reason = self._epochs()
            except Stopped as stopped:
                reason = str(stopped)
                self.saver.save_in_the_end()
            self.saver.insist()
        end = self._end(reason, time.perf_counter() - start)
        listener.end(end)
        if self.saver.unsaved is not None:
            raise SegFitError(f"the training ended ({reason}), but {self.saver.unsaved}")
        return end

    def ended(self) -> EndLog | None:
        """Return how a training ended that has nothing left to do, None if it has."""
        key = self._reached()
        return None if key is None else self._end("finished" if key == "epochs" else key, 0.0)

    def _end(self, reason: str, seconds: float) -> EndLog:
        progress = self.state.progress
        return EndLog(
            reason=reason,
            updates=progress.update,
            best_scores=progress.best_scores,
            best_epoch=progress.best_epoch,
            seconds=seconds,
        )

    def _reached(self) -> str | None:
        """Return the option by which the training is over, or None."""
        if self.state.progress.epoch >= self.options.epochs:
            return "epochs"
        if self._out_of_steps():
            return "max_steps"
        return "patience" if self._out_of_patience() else None

    def _refuse_if_over(self) -> None:
        key = self._reached()
        if key is not None:
            raise SegFitError(
                f"this run is over, nothing is left to train: {key}={getattr(self.options, key)} is "
                f"reached. To go on, raise {key}."
            )

    def _tell_start(self, facts: Mapping[str, str], unit: str, columns: Mapping[str, str]) -> None:
        state, progress, accumulate = self.state, self.state.progress, self.options.accumulate
        an_epoch = math.ceil(self.train.batches_per_epoch() / accumulate)
        left = math.ceil(max(self.train.batches_left(progress.sample), 0) / accumulate)
        # If batches had always been of this size.
        made = an_epoch - left + progress.epoch * an_epoch
        state.schedule_offset = made - progress.update
        state.scheduler.step_update(made)
        epochs = self.options.epochs
        self.teller.start(
            epochs, an_epoch, epochs * an_epoch - made, self.options.max_steps, facts, unit, columns
        )

    def _save_start(self) -> None:
        """Save what a roll-back goes to; also a trial of the disk before an hour's work depends on it."""
        try:
            self._save()
        except NotFinite as found:
            raise SegFitError(
                f"the {found} before the first update: the weights that training starts from are damaged "
                f"(model.weights)."
            ) from found

    def _epochs(self) -> str:
        while self.state.progress.epoch < self.options.epochs:
            if self._out_of_patience():
                return "patience"
            try:
                self._epoch()
            except NotFinite as found:
                self.teller.notice(self.recovery.roll_back(found))
            if self._out_of_steps():
                return "max_steps"
        return "finished"

    def _epoch(self) -> None:
        progress, options = self.state.progress, self.options
        self.teller.begin_epoch()
        start = time.perf_counter()
        self.state.model.train()
        self._train_epoch()
        seconds = time.perf_counter() - start

        self.state.average_buffers()
        due = (progress.epoch + 1) % options.val_every == 0
        last = progress.epoch + 1 == options.epochs or self._out_of_steps()
        self.result = self._validate() if due or last else None
        is_best = self._record(self.result)
        with phase("logging"):
            self.teller.tell_epoch(seconds, self.result, is_best)

        if self.train.batches_left(progress.sample) <= 0:
            progress.epoch, progress.sample = progress.epoch + 1, 0
            progress.loss_sum, progress.loss_count = 0.0, 0
        self._save()

    def _train_epoch(self) -> None:
        progress, options, world = self.state.progress, self.options, self.state.world
        window = self.teller.open()
        batches = iter(self.train.epoch(progress.epoch, progress.sample))
        while not self._out_of_steps():
            waiting = time.perf_counter()
            with phase("data"), self._saving_before_it_ends(window):
                micro_batches = list(islice(batches, options.accumulate))
            if not micro_batches:
                break
            waited = time.perf_counter() - waiting

            samples = sum(count_samples(batch) for batch in micro_batches) * world.size
            update = self.updater.update(micro_batches)
            if update is not None:
                scaled = self.state.scaler.is_enabled()
                window.add(*update, samples, waited, scaled=scaled)

            progress.sample += samples
            window = self._log(window)
            self._stop_or_save(window)
        with phase("logging"):
            self.teller.tell(window)

    @contextmanager
    def _saving_before_it_ends(self, window: Window) -> Iterator[None]:
        """Save the state if the data end the training: it is whole between two updates."""
        try:
            yield
        except Exception:
            alone = self.state.world.size == 1  # several cannot save without the one that failed
            if alone:
                with suppress(NotFinite):
                    self.teller.keep(window)
                    self.saver.save_in_the_end()
            raise

    def _log(self, window: Window) -> Window:
        """Tell the update; where it is time, also the window's means, and return a fresh one."""
        progress = self.state.progress
        with phase("logging"):
            self.teller.listener.step(progress.epoch, progress.update)
            if progress.update % self.options.log_every == 0:
                return self.teller.tell(window)
        return window

    def _validate(self) -> Findings:
        state = self.state

        def between(done: int) -> None:
            self.teller.listener.validating(done, self.held_out_batches)
            # Resuming validates again: no update is lost. Several processes have unequal numbers of batches and
            # cannot agree in between.
            if self.stop.reason is not None and state.world.size == 1:
                raise Stopped(self.stop.reason)

        def lowered(size: int, told: str) -> None:
            state.progress.held_out_batch = size
            self.teller.notice(told)

        with phase("validation", whole=True):
            return evaluate(
                state.evaluated(),
                self.task,
                self.held_out(),
                state.precision,
                between,
                largest=state.progress.held_out_batch,
                lowered=lowered,
            )

    def _record(self, result: Findings | None) -> bool:
        """Remember a validation; return whether it is the best so far, saving it if so."""
        if result is None:
            return False
        progress = self.state.progress
        score = result.scores[self.options.monitor]
        best = progress.best_score
        if math.isnan(score) or (best is not None and score <= best):
            progress.stale += 1
            return False
        with phase("checkpoint"):
            if not self.saver.save_best(result):
                return False  # so that the next one that is better is saved
        progress.best_score, progress.best_scores = score, dict(result.scores)
        progress.best_epoch, progress.stale = progress.epoch, 0
        return True

    # ------------------------------------------------------------------------- stopping, saving

    def _out_of_steps(self) -> bool:
        limit = self.options.max_steps
        return limit is not None and self.state.progress.update >= limit

    def _out_of_patience(self) -> bool:
        limit = self.options.patience
        return limit is not None and self.state.progress.stale >= limit

    def _stop_or_save(self, window: Window) -> None:
        asked = int(self.stop.reason is not None)
        stop, save = self.state.world.max(asked, int(self.saver.is_due()))
        if stop or save:
            self.teller.keep(window)
        if stop:
            raise Stopped(self.stop.reason or "terminated")  # where another process was asked
        if save:
            self._save()

    def _save(self) -> None:
        with phase("checkpoint"):
            self.saver.save()
