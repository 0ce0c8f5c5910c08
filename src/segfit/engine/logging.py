"""What the loop tells of its updates and epochs: means that are read from the device seldom."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from segfit.engine.events import EpochLog, Listener, Listeners, RunInfo, StepLog
from segfit.engine.findings import Findings
from segfit.engine.non_finite import NotFinite, describe
from segfit.engine.state import TrainingState
from segfit.engine.step import scale_of
from segfit.system.hardware import peak_memory_gib


@dataclass
class Window:
    """The updates since the last log: sums stay on the device until then."""

    loss: Tensor
    norm: Tensor
    updates: int
    skipped: Tensor
    samples: int = 0
    waited: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def add(
        self, loss: Tensor, norm: Tensor, samples: int, waited: float, *, scaled: bool = False
    ) -> None:
        """Count an update.

        Args:
            loss: this process's share of it, () on the device.
            norm: of the gradient, () on the device.
            samples: of all processes.
            waited: seconds that the loop waited for them.
            scaled: an overflown gradient is the scaler's business, which skipped the update.
        """
        if scaled:
            self.skipped += ~norm.isfinite()
            norm = norm.nan_to_num(0.0, 0.0, 0.0)
        self.loss += loss
        self.norm += norm
        self.updates += 1
        self.samples += samples
        self.waited += waited


class Teller:
    """Sums up updates and epochs, and tells them to a listener.

    Args:
        state: what is trained; sums that a resumed run needs go into its progress.

    Attributes:
        listener: who is told.
        total_samples: samples trained on in this session.
        total_seconds: seconds that they took, without validation.
    """

    def __init__(self, state: TrainingState) -> None:
        self.state = state
        self.listener: Listener = Listeners()
        self.total_samples, self.total_seconds = 0, 0.0
        self._samples, self._waited = 0, 0.0  # of the epoch
        # Updates that were told of: what is made again after a roll-back is not told again.
        self._told, self._told_epoch = -1, -1

    def start(
        self,
        epochs: int,
        updates_per_epoch: int,
        updates_left: int,
        max_steps: int | None,
        facts: Mapping[str, str],
        unit: str,
        columns: Mapping[str, str],
    ) -> None:
        """Tell what is about to run."""
        progress = self.state.progress
        total = progress.update + updates_left
        self.listener.start(
            RunInfo(
                epochs=epochs,
                updates_per_epoch=updates_per_epoch,
                start_epoch=progress.epoch,
                start_update=progress.update,
                total_updates=min(total, max_steps or total),
                facts=facts,
                unit=unit,
                columns=columns,
            )
        )

    def begin_epoch(self) -> None:
        """Count samples and waiting from here on; an epoch that a roll-back cut short counts from its new start."""
        self._samples, self._waited = 0, 0.0

    def notice(self, message: str) -> None:
        """Tell what the person should know."""
        self.listener.notice(message)

    def open(self) -> Window:
        """Return a window that goes on where the progress stands."""
        progress, device = self.state.progress, self.state.device
        # Sums over all processes count once what was summed up before.
        carried = progress.window_loss if self.state.world.is_main else 0.0
        return Window(
            loss=torch.tensor(carried, device=device),
            norm=torch.tensor(progress.window_norm, device=device),
            updates=progress.window_updates,
            skipped=torch.zeros((), dtype=torch.int64, device=device),
        )

    def keep(self, window: Window) -> int:
        """Read the window's sums from the device into the progress; return the updates that the scaler skipped.

        Every process of the world has to call.

        Raises:
            NotFinite: if loss or gradient is not finite; what was saved last is from before.
        """
        progress = self.state.progress
        loss = self.state.world.sum(window.loss.clone())
        # synchronises
        sums = torch.stack([loss.double(), window.norm.double(), window.skipped.double()]).tolist()
        found = describe(sums[0], sums[1], scale=1.0)
        if found is not None:
            raise NotFinite(f"{found} within the last {window.updates} updates")
        progress.window_loss, progress.window_norm = sums[0], sums[1]
        progress.window_updates = window.updates
        return int(sums[2])

    def tell(self, window: Window) -> Window:
        """Log the means of the window and return a fresh one.

        Raises:
            NotFinite: if loss or gradient is not finite.
        """
        if window.updates == 0:
            return window
        skipped = self.keep(window)
        progress = self.state.progress
        seconds = time.perf_counter() - window.start
        scale = scale_of(self.state)  # synchronises
        if skipped and scale < 1.0:
            raise NotFinite("gradient overflows fp16 even where the loss is not scaled up")
        log = StepLog(
            epoch=progress.epoch,
            update=progress.update,
            loss=progress.window_loss / window.updates,
            lr=self._lr(),
            grad_norm=progress.window_norm / window.updates,
            loss_scale=scale,
            skipped=skipped,
            samples_per_second=window.samples / seconds,
            data_wait=window.waited / seconds,
            memory_gib=peak_memory_gib(self.state.device),
        )
        self._samples += window.samples
        self._waited += window.waited
        progress.loss_sum += progress.window_loss
        progress.loss_count += window.updates
        progress.window_loss, progress.window_norm, progress.window_updates = 0.0, 0.0, 0
        if progress.update > self._told:
            self._told = progress.update
            self.listener.log(log)
        return self.open()

    def tell_epoch(self, training_seconds: float, result: Findings | None, is_best: bool) -> None:
        """Tell that an epoch is over, and how long its training took."""
        progress = self.state.progress
        log = EpochLog(
            epoch=progress.epoch,
            update=progress.update,
            loss=progress.loss_sum / max(progress.loss_count, 1),
            lr=self._lr(),
            samples_per_second=self._samples / training_seconds,
            data_wait=self._waited / training_seconds,
            memory_gib=peak_memory_gib(self.state.device),
            seconds=training_seconds + (result.seconds if result else 0.0),
            result=result,
            is_best=is_best,
        )
        self.total_samples += self._samples
        self.total_seconds += training_seconds
        if progress.update > self._told_epoch:
            self._told_epoch = progress.update
            self.listener.epoch(log)

    def _lr(self) -> float:
        return float(self.state.optimizer.param_groups[0]["lr"])
