"""Everything that changes while training, what a checkpoint holds; and the seeds of all that is random."""

from __future__ import annotations

import gc
import hashlib
import os
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.precision import Precision
from segfit.engine.task import Forward

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler
    from timm.utils import ModelEmaV3


@dataclass
class Progress:
    """How far training is; raises an error if a value is no number, as in a checkpoint that was edited."""

    epoch: int = 0  # 0-based, that is running
    sample: int = 0  # samples of it that are done, of all processes, in the epoch's order
    update: int = 0  # updates made so far, over all epochs
    micro_batch: int = 0  # most samples of a forward pass, lowered out of memory; 0: no limit
    held_out_batch: int = 0  # the same for validation
    loss_sum: float = 0.0  # of the epoch's updates that were logged
    loss_count: int = 0  # number of these updates
    unlogged_loss: float = 0.0  # sum since the last log, so that a resumed run logs the same means
    unlogged_norm: float = 0.0  # sum of the gradient's norms since then
    unlogged_updates: int = 0
    best_score: float | None = None  # None before the first validation
    best_scores: dict[str, float] = field(default_factory=dict)  # all scores of that validation
    best_epoch: int | None = None
    stale: int = 0  # validations since then
    # [epoch, sample] of the updates that were left out, since their loss or gradient is not finite
    left_out: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        positions = (number for position in self.left_out for number in position)
        values = (*vars(self).values(), *self.best_scores.values(), *positions)
        if any(isinstance(value, str) for value in values):
            raise ValueError("its progress holds something else than numbers")


@dataclass
class TrainingState:
    """Model, optimizer and everything else that a training needs to continue exactly."""

    model: nn.Module  # the module itself, never its compiled form
    forward: Forward  # the model, its compiled form, or DistributedDataParallel around one of them
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler  # stepped by updates, a pure function of them: it has no state to save
    scaler: GradScaler  # enabled in fp16 only
    ema: ModelEmaV3 | None  # moving average of the weights
    precision: Precision
    device: torch.device
    progress: Progress = field(default_factory=Progress)
    distributed: Distributed = SINGLE_PROCESS
    proven: bool = False  # an update was made with this forward, so memory suffices for the next
    # updates that the schedule is ahead of progress.update, after the effective batch changed
    schedule_offset: int = 0
    graphs: bool = False  # the forward replays CUDA graphs: one forward and backward an update
    frozen: Sequence[nn.Parameter] = ()  # that take no gradient
    frozen_epochs: int | None = None  # first epochs in which that is so; None: all

    def train(self) -> None:
        """Put the model into training mode; what is frozen in this epoch stays as in evaluation. Every process has to call."""
        self.model.train()
        thawed = self.frozen_epochs is not None and self.progress.epoch >= self.frozen_epochs
        changed = [one for one in self.frozen if one.requires_grad != thawed]
        for parameter in changed:
            parameter.requires_grad_(thawed)
        if changed:
            self.renew_forward()
        for module in self.model.modules() if self.frozen else ():
            parameters = list(module.parameters())
            if parameters and not any(one.requires_grad for one in parameters):
                module.eval()

    def evaluated(self) -> nn.Module:
        """Return the module that is validated and saved as the best: the average if there is one."""
        model: nn.Module = self.ema.module if self.ema is not None else self.model
        return model

    def renew_forward(self) -> None:
        """Wrap the forward again after a pass that failed; every process has to call.

        DistributedDataParallel would otherwise take the next backward for that of the failed pass.
        """
        self.proven = False
        if self.distributed.size > 1:
            self.forward = inner = self.distributed.unwrap(self.forward)
            gc.collect()  # removes the old wrapper's hooks from the parameters
            self.forward = self.distributed.wrap(inner)

    def average_buffers(self) -> None:
        """Average batch norm's statistics over all processes, which saw different samples."""
        for model in dict.fromkeys((self.model, self.evaluated())):
            self.distributed.average_buffers(model)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only, so that it loads with `weights_only=True`.

        Every process has to call. It does not synchronise; copying the result to the host does.
        """
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
            "random": self.distributed.gather(random_state(self.device)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, random number generators included.

        A process whose rank did not exist when the state was saved keeps its own generators' state.
        """
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"] or state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        # If epochs were raised, the rest of the run follows the longer schedule.
        self.scheduler.step_update(self.progress.update + self.schedule_offset)
        if self.distributed.rank < len(state["random"]):
            set_random_state(state["random"][self.distributed.rank], self.device)


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed, a function of `parts` alone on every machine and version."""
    text = ",".join(str(int(part)) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed Python's, NumPy's and torch's global generators; `deterministic`: use such CUDA kernels where they exist."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        # The fused kernels of attention add atomically in backward, unless what has no other kernel is an error. On a CPU
        # they are deterministic.
        if torch.cuda.is_available():
            for name in ("flash", "mem_efficient", "cudnn"):
                getattr(torch.backends.cuda, f"enable_{name}_sdp")(False)
    else:
        torch.backends.cudnn.benchmark = True


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's global generators as plain values."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.get_device_module(device).get_rng_state() if device.type != "cpu" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `random_state` returned."""
    random.setstate(state["python"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if device.type != "cpu" and state["cuda"] is not None:
        torch.get_device_module(device).set_rng_state(state["cuda"].cpu())
