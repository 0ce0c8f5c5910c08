"""train.py in which one process of torchrun is struck: `python -m torch.distributed.run … torchrun_victim.py FAULT …`.

memory: passes of more than 2 images fail in process 1, from the third update on.
backward: the same in a backward pass that adds up gradients.
none: no process is struck.
first_backward: the backward pass of the first update fails in process 1, once.
first_step: so does its optimizer's step, after a weight was moved.
killed: process 1 kills itself before the fourth update.
bug: the third update fails in process 1.
bug_while_closing: so does it, while process 0 takes its time to close what it writes.
nan: from the fourth update of the first epoch on, for two updates, the images of process 1 are not numbers.
"""

import functools
import os
import runpy
import signal
import sys
import time
from typing import Any

import torch

from segfit.engine import recovery
from segfit.models.cnn import CNN
from segfit.report.tensorboard import TensorBoardLogger
from segfit.tasks.segmentation.task import SegmentationTask
from tests.integration.training import ROOT

STRUCK = os.environ["RANK"] == "1"
_update, _close = [0], TensorBoardLogger.close
_make_update, _forward, _prepare = recovery.make_update, CNN.forward, SegmentationTask.prepare
_backward, _step = torch.Tensor.backward, torch.optim.SGD.step


def _counting(state: Any, *args: Any, **options: Any) -> Any:
    _update[0] = state.progress.update
    if STRUCK and fault == "killed" and _update[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return _make_update(state, *args, **options)


def _out_of_memory(self: CNN, images: torch.Tensor) -> torch.Tensor:
    if self.training and len(images) > 2 and _update[0] >= 2:
        raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
    return _forward(self, images)


def _out_of_memory_in_backward(self: torch.Tensor, *args: Any, **options: Any) -> None:
    if _update[0] >= 2:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    _backward(self, *args, **options)


def _out_of_memory_once(self: torch.Tensor, *args: Any, **options: Any) -> None:
    torch.Tensor.backward = _backward  # type: ignore[method-assign]
    raise torch.OutOfMemoryError("CUDA out of memory.")


def _out_of_memory_within_step(self: torch.optim.Optimizer, *args: Any, **options: Any) -> None:
    torch.optim.SGD.step = _step  # type: ignore[method-assign]
    with torch.no_grad():
        self.param_groups[0]["params"][0].add_(1.0)
    raise torch.OutOfMemoryError("CUDA out of memory.")


def _not_a_number(self: SegmentationTask, batch: Any, seed: int) -> Any:
    images, targets = _prepare(self, batch, seed)
    return images * (float("nan") if _update[0] in (3, 4) else 1.0), targets


def _bug(self: SegmentationTask, batch: Any, seed: int) -> Any:
    if _update[0] >= 2:
        raise ZeroDivisionError("of the test")
    return _prepare(self, batch, seed)


def _close_slowly(self: TensorBoardLogger) -> None:
    time.sleep(10)  # until torchrun's SIGTERM
    _close(self)


if __name__ == "__main__":
    fault = sys.argv.pop(1)
    recovery.make_update = _counting
    if fault in ("none", "first_backward", "first_step"):
        # Without batch norm, pieces of a batch give the gradient of the whole.
        CNN.__init__ = functools.partialmethod(CNN.__init__, norm="none")  # type: ignore[assignment]
    if STRUCK and fault == "memory":
        CNN.forward = _out_of_memory  # type: ignore[method-assign]
    elif STRUCK and fault == "backward":
        torch.Tensor.backward = _out_of_memory_in_backward  # type: ignore[method-assign]
    elif STRUCK and fault == "first_backward":
        torch.Tensor.backward = _out_of_memory_once  # type: ignore[method-assign]
    elif STRUCK and fault == "first_step":
        torch.optim.SGD.step = _out_of_memory_within_step  # type: ignore[method-assign]
    elif not STRUCK and fault == "bug_while_closing":
        TensorBoardLogger.close = _close_slowly  # type: ignore[method-assign]
    elif STRUCK and fault in ("bug", "bug_while_closing"):
        SegmentationTask.prepare = _bug  # type: ignore[method-assign]
    elif STRUCK and fault == "nan":
        SegmentationTask.prepare = _not_a_number  # type: ignore[method-assign]
    sys.argv[0] = str(ROOT / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
