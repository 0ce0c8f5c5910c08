"""The processes that train one model together, by default one; how torchrun's find each other, and end when one fails.

Gradients are averaged by DistributedDataParallel, hosts exchange plain values by gloo.
"""

import atexit
import gc
import json
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from inspect import signature
from types import FrameType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.task import Forward
from segfit.errors import SegFitError, raise_all
from segfit.system.hardware import resolve_device
from segfit.system.process import Launch, launched, leave_reason

T = TypeVar("T")

# For waiting while one process checks or decodes a data set. A process that is gone is noticed at once.
_HOST_TIMEOUT = timedelta(days=1)
# For GPUs that wait while one process saves a checkpoint or has more samples to validate.
_DEVICE_TIMEOUT = timedelta(minutes=30)
_REASON_SECONDS = 2.0  # in which a failed process must give its reason
_GONE = (
    "another process of this training ended without giving a reason: killed (out of host memory?), or its machine "
    "failed. Continue with resume= and the run's folder."
)
_TERMINATED = "terminated by SIGTERM: from outside, or since another process of this training ended without giving a reason."
# A process that repeats a pass would wait for buffers that the others do not send again. (torch renamed the option.)
_NEW = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_OWN_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _NEW else "broadcast_buffers": False}


class PeerFailed(Exception):  # noqa: N818 - the other process reports the error
    """Another process of this training failed in this update."""


class _Terminated(BaseException):
    """Raised by the SIGTERM; no `except Exception` catches it."""


class Distributed:
    """This process and those that train with it; alone, it has nothing to exchange.

    Every process has to call every method, except `post` and `posted`.
    """

    rank = 0  # 0-based number of this process among all
    size = 1  # number of processes
    store: Any = None  # what several processes leave for each other; torchrun's own server holds it, and outlives them

    def join(self, launch: Launch, device: torch.device) -> None:
        """Join the other processes of torch.distributed's default group, which has to be initialised."""
        self.rank, self.size, self._local_rank = launch.rank, launch.size, launch.local_rank
        self._device = device
        self._host: Any = None  # the default group
        if device.type == "cuda":
            self._host = dist.new_group(timeout=_HOST_TIMEOUT, backend="gloo")
        self.store = distributed_c10d.PrefixStore("segfit", distributed_c10d._get_default_store())
        self._read = 0  # notices

    @property
    def is_main(self) -> bool:
        """Whether this is the process that logs and writes files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor on the device; the host does not wait for it."""
        if self.store is None:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def max(self, *numbers: int) -> tuple[int, ...]:
        """Return the largest of each number over all processes; waits for the other hosts, not for the device."""
        if self.store is None:
            return numbers
        largest = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._host)
        return tuple(largest.tolist())

    def gather(self, value: T) -> list[T]:
        """Return the value (picklable) of every process, by rank."""
        if self.store is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._host)
        return values

    def once_a_machine(self, work: Callable[[], T]) -> T:
        """Call `work` in the first process of each machine; return its result (picklable) in all of that machine."""
        if self.store is None:
            return work()
        result = work() if self._local_rank == 0 else cast(T, None)
        every = self.gather(result)
        return result if self._local_rank == 0 else every[self.rank - self._local_rank]

    def post(self, line: str) -> None:
        """Send a notice to the main process, which reads it when it logs."""
        if self.store is not None:
            self.store.set(f"line {self.store.add('lines', 1)}", line)

    def posted(self) -> list[str]:
        """Return the notices that were posted since the last call; only the main process calls."""
        if self.store is None:
            return []
        read, self._read = self._read, self.store.add("lines", 0)
        return [self.store.get(f"line {at + 1}").decode() for at in range(read, self._read)]

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return a module whose backward averages gradients over all processes; weights become the main process's."""
        if self.store is None:
            return model
        # Gradients of the fast SegFormer's strided convolutions, computed as products, have another layout: they are copied.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        return DistributedDataParallel(
            model,
            device_ids=[self._device] if self._device.type == "cuda" else None,
            **_OWN_BUFFERS,
            gradient_as_bucket_view=True,  # saves a copy of all gradients
        )

    def unwrap(self, forward: Forward) -> nn.Module:
        """Return what `wrap` was given."""
        module = forward.module if isinstance(forward, DistributedDataParallel) else forward
        return cast(nn.Module, module)

    def no_sync(self, forward: Forward) -> AbstractContextManager[Any]:
        """Return a context in which passes leave their gradients in this process, for accumulation."""
        return forward.no_sync() if isinstance(forward, DistributedDataParallel) else nullcontext()

    def average_gradients(self, model: nn.Module) -> None:
        """Average over all processes the gradients that passes in `no_sync` left."""
        for parameter in model.parameters() if self.store is not None else ():
            if parameter.grad is not None:
                # In DistributedDataParallel's order: divided first, then summed.
                parameter.grad.copy_(self.sum(parameter.grad.contiguous() / self.size))

    def average_buffers(self, model: nn.Module) -> None:
        """Average the model's floating-point buffers (batch norm's running statistics) over all processes."""
        for buffer in model.buffers() if self.store is not None else ():
            if buffer.is_floating_point():
                buffer.copy_(self.sum(buffer.float()) / self.size)


SINGLE_PROCESS = Distributed()


def refuse_differences(distributed: Distributed, values: Mapping[str, Any]) -> None:
    """Compare plain values by name with those of the other processes; every process has to call.

    Machines differ: `hardware=auto` is another recipe on each kind of card, `precision=auto` another precision. Raises a
    SegFitError if values differ, the same in every process.
    """
    every = distributed.gather(dict(values))
    problems = []
    for name in sorted({name for one in every for name in one}):
        found = [one.get(name) for one in every]
        odd = next((rank for rank, value in enumerate(found) if value != found[0]), None)
        if odd is not None:
            problems.append(
                f"the processes do not train the same: {name} is {found[0]} in process 0, {found[odd]} in process {odd}. "
                f"Give {name.split('.')[0]}= on the command line, and the same command to every machine."
            )
    raise_all(problems)


@contextmanager
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
    processes = Distributed()
    processes.join(launch, _initialized(launch, requested))
    # torchrun sends SIGTERM to all when one has failed: this one may still have to report why.
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield processes
        processes.gather(None)  # none ends before the main process has written everything
    except (Exception, _Terminated) as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while the reason is reported
        end = _explained(processes, error)
        if end is error:
            raise
        raise end from error
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    groups = [dist.group.WORLD]
    dist.destroy_process_group()
    # Gloo's threads end with the last reference to a group. Cycles that hold one are freed while Python still runs: a thread
    # that wants the interpreter after its end aborts the process. The last one is ours: DistributedDataParallel keeps the
    # interpreter while it waits for the threads' end, and with torch 2.13 a thread may be waiting for the interpreter.
    atexit.register(groups.clear)  # after what is registered later
    atexit.register(gc.collect)


def _initialized(launch: Launch, requested: str) -> torch.device:
    """Initialise the group of all processes; return this one's device."""
    if requested != "cpu" and torch.cuda.is_available():
        cards = torch.cuda.device_count()
        if launch.local_rank >= cards:
            raise SegFitError(
                f"torchrun started {launch.local_size} processes on this machine, but CUDA shows {cards} "
                f"card{'s' * (cards != 1)}. Start one per card (--nproc_per_node={cards}), or add device=cpu."
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
            f"the {launch.size} processes of this training cannot find each other ({str(error).splitlines()[0]}). "
            "Start them by torchrun; on several machines, all with the same --rdzv_endpoint."
        ) from error
    return device


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise _Terminated


def _explained(processes: Distributed, error: BaseException) -> BaseException:
    """Return what this process should raise after an error, its own or that of another process."""
    store = processes.store
    try:
        if not _is_from_peer(error):
            return _own(processes, error)
        if _appears(store, "failure"):
            failure = json.loads(store.get("failure"))
            reason = f"process {failure['rank']} of {processes.size} ended: {failure['text']}"
            code = failure["code"]
        elif isinstance(error, _Terminated):
            reason, code = _TERMINATED, 128 + signal.SIGTERM
        else:
            first = store.add("gone", 1) == 1  # else another process reports it
            return SegFitError(_GONE, 1) if first else SystemExit(1)
        return SegFitError(reason, code) if processes.is_main else SystemExit(code)
    except RuntimeError:  # the store is gone: without torchrun it is in the main process
        return SegFitError(_GONE, 1)


def _own(processes: Distributed, error: BaseException) -> BaseException:
    rank, store, code, text = processes.rank, processes.store, 1, f"{type(error).__name__}: {error}"
    if isinstance(error, SegFitError):
        code, text = error.exit_code, str(error)
    leave_reason(text)
    if store.add("failures", 1) == 1:
        store.set("failure", json.dumps({"rank": rank, "text": text, "code": code}))
    if processes.is_main:
        store.set("reported", "")
        return error
    # If all processes failed alike, only the main one reports it.
    if _appears(store, "reported") or isinstance(error, SegFitError):
        return SystemExit(code)
    return error


def _appears(store: Any, key: str) -> bool:
    """Return whether a key is in the store, or gets there soon."""
    try:
        store.wait([key], timedelta(seconds=_REASON_SECONDS))
    except dist.DistStoreError:
        return False
    return True


def _is_from_peer(error: BaseException) -> bool:
    """Return whether an error only means that another process failed or is gone."""
    if is_out_of_memory(error):  # NCCL's own buffers, in this process
        return False
    if isinstance(error, (PeerFailed, _Terminated, dist.DistError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("gloo" in text or "nccl" in text)
