"""How the processes that torchrun started find each other, and how they end when one fails."""

import atexit
import contextlib
import gc
import json
import signal
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from segfit.engine.distributed import HOST_TIMEOUT, SINGLE_PROCESS, Distributed
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.step import PeerFailed
from segfit.errors import SegFitError
from segfit.system.hardware import resolve_device
from segfit.system.process import Launch, launched, leave_reason

# For GPUs that wait while one process saves a checkpoint or has more samples to validate.
_DEVICE_TIMEOUT = timedelta(minutes=30)
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
    dist.destroy_process_group()
    # Gloo's threads end with the last reference to a group. Cycles that hold one are freed while Python still runs: a thread
    # that wants the interpreter after its end aborts the process.
    atexit.register(gc.collect)


def _initialized(launch: Launch, requested: str) -> torch.device:
    """Initialise the group of all processes; return this one's device."""
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
            dist.init_process_group("gloo", timeout=HOST_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise SegFitError(
            f"the {launch.size} processes of this training cannot find each other "
            f"({str(error).splitlines()[0]}). Start them by torchrun; on several machines, all with the same "
            f"--rdzv_endpoint."
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
