"""The processes that torchrun started: gradients by DistributedDataParallel, messages between hosts by gloo."""

import atexit
import contextlib
import gc
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from inspect import signature
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.step import PeerFailed
from segfit.engine.task import Forward
from segfit.errors import SegFitError
from segfit.system.hardware import resolve_device
from segfit.system.torchrun_env import Launch, launched, leave_reason

T = TypeVar("T")

# For waiting while one process checks or decodes a data set. A process that is gone is noticed at once.
_HOST_TIMEOUT = timedelta(days=1)
# For GPUs that wait while one process saves a checkpoint or has more samples to validate.
_DEVICE_TIMEOUT = timedelta(minutes=30)
# A process that repeats a pass would wait for buffers that the others do not send again. (torch renamed the option.)
_parameters = signature(DistributedDataParallel).parameters
_OPTION = "forward_sync_buffers" if "forward_sync_buffers" in _parameters else "broadcast_buffers"
_OWN_BUFFERS: dict[str, Any] = {_OPTION: False}
_REASON_SECONDS = 2.0  # in which a failed process must give its reason
_GONE = (
    "another process of this training ended without giving a reason: killed (out of host memory?), or its machine "
    "failed. Continue with resume= and the run's folder."
)
_TERMINATED = "terminated by SIGTERM: from outside, or since another process of this training ended without giving a reason."


class _Terminated(BaseException):
    """Raised by the SIGTERM; no `except Exception` catches it."""


@contextlib.contextmanager
def joined(requested: str) -> Iterator[Distributed]:
    """Yield the processes that torchrun started, `SINGLE_PROCESS` without it; an error in this context ends all of them.

    The main process raises why: its own error, or a SegFitError with the other's. The others end silently (SystemExit),
    except for the traceback of a bug of their own. Each takes the GPU of its number on this machine, if the `requested`
    device ("auto", "cpu" or "cuda") is one. Raises a SegFitError if there are too few, or the processes cannot find each
    other.
    """
    launch = launched()
    if launch.size == 1:
        yield SINGLE_PROCESS
        return
    processes = _Torchrun(launch, _join(launch, requested))
    # torchrun sends SIGTERM to all when one has failed: this one may still have to report why.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield processes
        processes.gather(None)  # none ends before the main process has written everything
    except (Exception, _Terminated) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while the reason is reported
        end = processes.explained(error)
        if end is error:
            raise
        raise end from error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    dist.destroy_process_group()
    # Gloo's threads end with the last reference to a group. Cycles that hold one are freed while Python still runs: a thread
    # that wants the interpreter after its end aborts the process.
    atexit.register(gc.collect)


def _join(launch: Launch, requested: str) -> torch.device:
    if requested != "cpu" and torch.cuda.is_available():
        cards = torch.cuda.device_count()
        if launch.local_rank >= cards:
            raise SegFitError(
                f"torchrun started {launch.local_size} processes on this machine, but CUDA shows {cards} card"
                f"{'s' * (cards != 1)}. "
                f"Start one per card (--nproc_per_node={cards}), or add device=cpu."
            )
        torch.cuda.set_device(launch.local_rank)
    device, _ = resolve_device(requested)
    try:
        if device.type == "cuda":
            dist.init_process_group("nccl", timeout=_DEVICE_TIMEOUT, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=_HOST_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise SegFitError(
            f"the {launch.size} processes of this training cannot find each other "
            f"({str(error).splitlines()[0]}). Start them by torchrun; on several machines, all with the same "
            f"--rdzv_endpoint."
        ) from error
    return device


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


class _Torchrun(Distributed):
    """Processes in torch.distributed's default process group, which has to be initialised."""

    def __init__(self, launch: Launch, device: torch.device) -> None:
        self.rank, self.size, self.local_rank = launch.rank, launch.size, launch.local_rank
        self.device = device
        on_card = device.type == "cuda"
        group = dist.new_group(timeout=_HOST_TIMEOUT, backend="gloo") if on_card else None
        self._host = cast(dist.ProcessGroup | None, group)
        # torchrun's own server holds it, and outlives every process of the training.
        self._store = distributed_c10d.PrefixStore("segfit", distributed_c10d._get_default_store())
        self._read = 0  # notices

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total

    def max(self, *numbers: int) -> tuple[int, ...]:
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._host)
        return tuple(largest.tolist())

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def once_a_machine(self, work: Callable[[], T]) -> T:
        if self.local_rank == 0:
            result = work()
            self.gather(result)
            return result
        return self.gather(cast(T, None))[self.rank - self.local_rank]

    def post(self, line: str) -> None:
        self._store.set(f"line {self._store.add('lines', 1)}", line)

    def posted(self) -> list[str]:
        first, self._read = self._read + 1, self._store.add("lines", 0)
        numbers = range(first, self._read + 1)
        return [self._store.get(f"line {number}").decode() for number in numbers]

    def wrap(self, model: nn.Module, forward: Forward) -> Forward:
        # Gradients of the fast SegFormer's strided convolutions, computed as products, have another layout: they are copied.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(
            forward if isinstance(forward, nn.Module) else model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            **_OWN_BUFFERS,
            gradient_as_bucket_view=True,  # saves a copy of all gradients
        )

    def unwrap(self, forward: Forward) -> Forward:
        assert isinstance(forward, DistributedDataParallel)
        return cast(nn.Module, forward.module)

    def no_sync(self, forward: Forward) -> contextlib.AbstractContextManager[Any]:
        assert isinstance(forward, DistributedDataParallel)
        return forward.no_sync()

    def average_gradients(self, model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                # In DistributedDataParallel's order: divided first, then summed.
                parameter.grad.copy_(self.sum(parameter.grad.contiguous() / self.size))

    def average_buffers(self, model: nn.Module) -> None:
        buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        if not buffers:
            return
        mean = self.sum(torch.cat([buffer.float().flatten() for buffer in buffers])) / self.size
        sizes = [buffer.numel() for buffer in buffers]
        for buffer, part in zip(buffers, mean.split(sizes), strict=True):
            buffer.copy_(part.view_as(buffer))

    def explained(self, error: BaseException) -> BaseException:
        """Return what this process should raise after an error, its own or that of another process."""
        try:
            if not _is_from_peer(error):
                return self._own(error)
            if self._appears("failure"):
                failure = json.loads(self._store.get("failure"))
                reason = f"process {failure['rank']} of {self.size} ended: {failure['text']}"
                return self._reported(reason, failure["code"])
            if isinstance(error, _Terminated):
                return self._reported(_TERMINATED, 128 + signal.SIGTERM)
            first = self._store.add("gone", 1) == 1  # else another process reports it
            return SegFitError(_GONE, 1) if first else SystemExit(1)
        except RuntimeError:  # the store is gone: without torchrun it is in the main process
            return SegFitError(_GONE, 1)

    def _own(self, error: BaseException) -> BaseException:
        code = error.exit_code if isinstance(error, SegFitError) else 1
        text = str(error) if isinstance(error, SegFitError) else f"{type(error).__name__}: {error}"
        leave_reason(text)
        if self._store.add("failures", 1) == 1:
            self._store.set("failure", json.dumps({"rank": self.rank, "text": text, "code": code}))
        if self.is_main:
            self._store.set("reported", "")
            return error
        # If all processes failed alike, only the main one reports it.
        if self._appears("reported") or isinstance(error, SegFitError):
            return SystemExit(code)
        return error

    def _reported(self, reason: str, code: int) -> BaseException:
        return SegFitError(reason, code) if self.is_main else SystemExit(code)

    def _appears(self, key: str) -> bool:
        """Return whether a key is in the store, or gets there soon."""
        deadline = time.monotonic() + _REASON_SECONDS
        while not self._store.check([key]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True


def _is_from_peer(error: BaseException) -> bool:
    """Return whether an error only means that another process failed or is gone."""
    if is_out_of_memory(error):  # NCCL's own buffers, in this process
        return False
    if isinstance(error, (PeerFailed, _Terminated, dist.DistError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
