"""What the training loop logs of its updates and epochs."""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from segfit.engine.events import EpochLog, Listener, Listeners, StepLog
from segfit.engine.findings import Findings
from segfit.engine.non_finite import NotFinite, describe
from segfit.engine.optim import base_rate
from segfit.engine.state import TrainingState
from segfit.engine.step import loss_scale
from segfit.system.hardware import peak_memory_gib


@dataclass
class RunningSums:
    """Sums over the updates since the last log; tensors stay on the device until then."""

    loss: Tensor
    norm: Tensor
    skipped: Tensor  # updates that GradScaler skipped
    empty: Tensor  # updates in which nothing counted: they are in no mean
    updates: int
    samples: int = 0
    waited: float = 0.0
    start: float = field(default_factory=time.perf_counter)


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan


class TrainingLog:
    """Sums up updates and epochs, and passes their means to a listener."""

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
        self._samples, self._waited = 0, 0.0
        self._sums = self._new_sums()

    def _new_sums(self) -> RunningSums:
        progress, device = self.state.progress, self.state.device
        # The sum over all processes contains the main process's once.
        carried = progress.unlogged_loss if self.state.distributed.is_main else 0.0
        return RunningSums(  # synchronises: copies from the host
            loss=torch.tensor(carried, device=device),
            norm=torch.tensor(progress.unlogged_norm, device=device),
            skipped=torch.zeros((), dtype=torch.int64, device=device),
            empty=torch.zeros((), dtype=torch.int64, device=device),
            updates=progress.unlogged_updates,
        )

    def add(self, loss: Tensor, norm: Tensor, counted: Tensor, samples: int, waited: float) -> None:
        """Count an update of `samples` over all processes, for which the loop waited so many seconds.

        The tensors are those of `make_update`.
        """
        sums = self._sums
        if self.state.scaler.is_enabled():  # an overflow is no fault: GradScaler skipped the update
            sums.skipped += ~norm.isfinite()
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        sums.loss += loss
        sums.norm += norm
        sums.empty += ~counted
        sums.updates += 1
        sums.samples += samples
        sums.waited += waited

    def to_progress(self) -> int:
        """Read the sums into the progress, to be saved; return the updates that GradScaler skipped.

        Every process has to call. Raises NotFinite if loss or gradient is not finite; the last checkpoint is from before.
        """
        progress, sums = self.state.progress, self._sums
        loss = self.state.distributed.sum(sums.loss)
        sum_of = [loss.double(), sums.norm.double(), sums.skipped.double(), sums.empty.double()]
        total, norm, skipped, empty = torch.stack(sum_of).tolist()  # synchronises
        found = describe(total, norm, scale=1.0)
        if found is not None:
            raise NotFinite(f"{found} within the last {sums.updates} updates")
        progress.unlogged_loss, progress.unlogged_norm = total, norm
        progress.unlogged_updates = sums.updates - int(empty)
        return int(skipped)

    def log(self) -> None:
        """Log the means since the last log; raises as `to_progress`."""
        sums, progress = self._sums, self.state.progress
        if sums.updates == 0:
            return
        skipped = self.to_progress()  # synchronises
        seconds = time.perf_counter() - sums.start
        scale = loss_scale(self.state)  # synchronises
        if skipped and scale < 1.0:
            raise NotFinite("gradient overflows fp16 even where the loss is not scaled up")
        log = StepLog(
            epoch=progress.epoch,
            update=progress.update,
            loss=_mean(progress.unlogged_loss, progress.unlogged_updates),
            lr=self._lr(),
            grad_norm=_mean(progress.unlogged_norm, progress.unlogged_updates),
            loss_scale=scale,
            skipped=skipped,
            samples_per_second=sums.samples / seconds,
            data_wait=sums.waited / seconds,
            memory_gib=peak_memory_gib(self.state.device),
        )
        self._samples += sums.samples
        self._waited += sums.waited
        progress.loss_sum += progress.unlogged_loss
        progress.loss_count += progress.unlogged_updates
        progress.unlogged_loss, progress.unlogged_norm, progress.unlogged_updates = 0.0, 0.0, 0
        if progress.update > self._last_update:
            self._last_update = progress.update
            self.listener.log(log)
        self._sums = self._new_sums()

    def log_epoch(self, seconds: float, result: Findings | None, is_best: bool) -> None:
        """Log an epoch whose training took `seconds`."""
        progress = self.state.progress
        log = EpochLog(
            epoch=progress.epoch,
            update=progress.update,
            loss=_mean(progress.loss_sum, progress.loss_count),
            lr=self._lr(),
            samples_per_second=self._samples / seconds,
            data_wait=self._waited / seconds,
            memory_gib=peak_memory_gib(self.state.device),
            seconds=seconds + (result.seconds if result else 0.0),
            result=result,
            is_best=is_best,
        )
        self.total_samples += self._samples
        self.total_seconds += seconds
        if progress.update > self._last_epoch_end:
            self._last_epoch_end = progress.update
            self.listener.epoch(log)

    def _lr(self) -> float:
        return base_rate(self.state.optimizer.param_groups[0])
