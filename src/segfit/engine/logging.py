"""What the loop logs: sums over updates, read from the device seldom."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from segfit.engine.events import EpochLog, Listener, Listeners, StepLog
from segfit.engine.findings import Findings
from segfit.engine.optim import base_rate
from segfit.engine.state import TrainingState
from segfit.engine.step import NotFinite, not_finite
from segfit.system.hardware import peak_memory_gib


class TrainingLog:
    """What the loop logs: it sums up updates and epochs, and passes their means to a listener."""

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self.listener: Listener = Listeners()
        # samples trained on in this session, and what they took, without validation
        self.total_samples, self.total_seconds = 0, 0.0
        self.begin_epoch()
        # what a roll-back repeats is not logged again
        self._last_update, self._last_epoch_end = -1, -1

    def notice(self, message: str) -> None:
        """Log something that the user should know."""
        self.listener.notice(message)

    def begin_epoch(self) -> None:
        """Count from the present progress on; an epoch that a roll-back cut short counts from its new start."""
        self._epoch_samples, self._epoch_waited = 0, 0.0
        self._begin()

    def _begin(self) -> None:
        """Begin the sums since the last log, which stay on the device until the next."""
        progress = self.state.progress
        # The sum over all processes contains the main process's once.
        carried = progress.unlogged_loss if self.state.distributed.is_main else 0.0
        # Of losses, of norms, of updates that GradScaler skipped, of those in which nothing counted: they are in no mean.
        sums = [carried, progress.unlogged_norm, 0.0, 0.0]
        self._sums = torch.tensor(sums, device=self.state.device)  # synchronises: a copy
        self._updates, self._samples, self._waited = progress.unlogged_updates, 0, 0.0
        self._start = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor, counted: Tensor, samples: int, waited: float) -> None:
        """Count what `make_update` returned for so many samples of all processes, for which the loop waited so many seconds."""
        skipped = torch.zeros_like(loss)
        if self.state.scaler.is_enabled():  # an overflow is no fault: GradScaler skipped the update
            skipped = ~norm.isfinite()
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        self._sums += torch.stack([one.float() for one in (loss, norm, skipped, ~counted)])
        self._updates += 1
        self._samples += samples
        self._waited += waited

    def to_progress(self) -> int:
        """Read the sums into the progress, to be saved; return the updates that GradScaler skipped.

        Every process has to call. Raises NotFinite if loss or gradient is not finite; the last checkpoint is from before.
        """
        progress = self.state.progress
        loss = self.state.distributed.sum(self._sums[:1])
        total, norm, skipped, empty = torch.cat([loss, self._sums[1:]]).tolist()  # synchronises
        found = not_finite(total, norm)
        if found is not None:
            raise NotFinite(f"{found} within the last {self._updates} updates")
        progress.unlogged_loss, progress.unlogged_norm = total, norm
        progress.unlogged_updates = self._updates - int(empty)
        return int(skipped)

    def log(self) -> None:
        """Log the means since the last log; raises as `to_progress`."""
        if self._updates == 0:
            return
        progress, skipped = self.state.progress, self.to_progress()  # synchronises
        seconds = time.perf_counter() - self._start
        scale = self.state.scaler.get_scale()  # synchronises in fp16
        if skipped and scale < 1.0:
            raise NotFinite("gradient overflows fp16 even where the loss is not scaled up")
        loss, norm = progress.unlogged_loss, progress.unlogged_norm
        count = progress.unlogged_updates
        log = StepLog(
            **self._means(loss, count, self._samples, self._waited, seconds),
            grad_norm=norm / count if count else math.nan,
            loss_scale=scale,
            skipped=skipped,
        )
        self._epoch_samples += self._samples
        self._epoch_waited += self._waited
        progress.loss_sum += loss
        progress.loss_count += count
        progress.unlogged_loss, progress.unlogged_norm, progress.unlogged_updates = 0.0, 0.0, 0
        if progress.update > self._last_update:
            self._last_update = progress.update
            self.listener.log(log)
        self._begin()

    def log_epoch(self, seconds: float, result: Findings | None, is_best: bool) -> None:
        """Log an epoch whose training took `seconds`."""
        progress, samples = self.state.progress, self._epoch_samples
        means = self._means(
            progress.loss_sum, progress.loss_count, samples, self._epoch_waited, seconds
        )
        self.total_samples += samples
        self.total_seconds += seconds
        if progress.update > self._last_epoch_end:
            self._last_epoch_end = progress.update
            seconds += result.seconds if result else 0.0
            self.listener.epoch(EpochLog(**means, seconds=seconds, result=result, is_best=is_best))

    def _means(
        self, loss: float, count: int, samples: int, waited: float, seconds: float
    ) -> dict[str, Any]:
        """Return what both kinds of log say of some updates, by the fields of `Log`."""
        return {
            "epoch": self.state.progress.epoch,
            "update": self.state.progress.update,
            "loss": loss / count if count else math.nan,
            "lr": base_rate(self.state.optimizer.param_groups[0]),
            "samples_per_second": samples / seconds,
            "data_wait": waited / seconds,
            "memory_gib": peak_memory_gib(self.state.device),
        }
