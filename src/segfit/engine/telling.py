"""What the loop tells of its updates and epochs: means that are read from the device seldom."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from segfit.engine.events import EpochLog, EvalResult, Listener, Listeners, RunInfo, StepLog
from segfit.engine.state import TrainingState
from segfit.errors import SegFitError
from segfit.hardware import peak_memory_gib


@dataclass
class Window:
    """The updates since the last log: sums stay on the device until then."""

    loss: Tensor
    norm: Tensor
    updates: int
    images: int = 0
    waited: float = 0.0
    start: float = field(default_factory=time.perf_counter)

    def add(self, loss: Tensor, norm: Tensor, images: int, waited: float) -> None:
        """Count an update: its loss and norm, () on the device; its images; the seconds it waited for them."""
        self.loss += loss
        self.norm += norm
        self.updates += 1
        self.images += images
        self.waited += waited


class Teller:
    """Sums up updates and epochs, and tells them to a listener.

    Args:
        state: what is trained; sums that a resumed run needs go into its progress.
        last: the checkpoint that a message points to.

    Attributes:
        listener: who is told.
        total_images: images trained on in this session.
        total_seconds: seconds that they took, without validation.
    """

    def __init__(self, state: TrainingState, last: Path) -> None:
        self.state = state
        self.last = last
        self.listener: Listener = Listeners()
        self.total_images, self.total_seconds = 0, 0.0
        self._images, self._waited = 0, 0.0  # of the epoch

    def start(
        self, epochs: int, updates_per_epoch: int, max_steps: int | None, facts: Mapping[str, str]
    ) -> None:
        """Tell what is about to run."""
        total, progress = updates_per_epoch * epochs, self.state.progress
        self.listener.start(
            RunInfo(
                epochs=epochs,
                updates_per_epoch=updates_per_epoch,
                start_epoch=progress.epoch,
                start_update=progress.update,
                total_updates=min(total, max_steps or total),
                facts=facts,
            )
        )

    def open(self) -> Window:
        """Return a window that goes on where the progress stands."""
        progress, device = self.state.progress, self.state.device
        return Window(
            loss=torch.tensor(progress.window_loss, device=device),
            norm=torch.tensor(progress.window_norm, device=device),
            updates=progress.window_updates,
        )

    def keep(self, window: Window) -> None:
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
                f"{self.last} holds the last good state, if one was saved. Lower lr, keep "
                f"clip_grad_norm, or try precision=fp32."
            )
        progress.window_loss, progress.window_norm = loss, norm
        progress.window_updates = window.updates

    def tell(self, window: Window) -> Window:
        """Log the means of the window and return a fresh one."""
        if window.updates == 0:
            return window
        self.keep(window)
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
        self._images += window.images
        self._waited += window.waited
        progress.loss_sum += progress.window_loss
        progress.loss_count += window.updates
        progress.window_loss, progress.window_norm, progress.window_updates = 0.0, 0.0, 0
        self.listener.log(log)
        return self.open()

    def tell_epoch(self, training_seconds: float, result: EvalResult | None, is_best: bool) -> None:
        """Tell that an epoch is over, and how long its training took."""
        progress = self.state.progress
        log = EpochLog(
            epoch=progress.epoch,
            update=progress.update,
            loss=progress.loss_sum / max(progress.loss_count, 1),
            lr=self._lr(),
            images_per_second=self._images / training_seconds,
            data_wait=self._waited / training_seconds,
            memory_gib=peak_memory_gib(self.state.device),
            seconds=training_seconds + (result.seconds if result else 0.0),
            result=result,
            is_best=is_best,
        )
        self.total_images += self._images
        self.total_seconds += training_seconds
        self._images, self._waited = 0, 0.0
        self.listener.epoch(log)

    def _lr(self) -> float:
        return float(self.state.optimizer.param_groups[0]["lr"])
