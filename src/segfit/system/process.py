"""This process: its rank among torchrun's, signals that end it, output that outlives its readers. Does not import torch."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, cast

# Slurm and submitit send SIGUSR1 or SIGUSR2 when time is up or the job is preempted, a terminal that closes SIGHUP.
STOPPING = {
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)  # not on Windows
}


@dataclass(frozen=True)
class Launch:
    """This process among those that train one model."""

    rank: int = 0  # 0-based number among all
    size: int = 1  # how many there are
    local_rank: int = 0  # 0-based number among those of this machine
    local_size: int = 1  # how many there are on this machine


def launched() -> Launch:
    """Return this process's ranks from torchrun's environment variables; alone without torchrun or with one process."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size < 2 or "RANK" not in os.environ:
        return Launch()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Launch(int(os.environ["RANK"]), size, local_rank, local_size)


def leave_reason(text: str) -> None:
    """Write why this process ends, for the summary that torchrun prints."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        return
    # The format of torch.distributed.elastic.multiprocessing.errors.
    extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
    content = {"message": {"message": text, "extraInfo": extra}}
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps(content), encoding="utf-8")


class LastingStream:
    """A text stream with a file descriptor that discards what is written once its pipe or terminal is closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or discard the text if the reader is gone."""
        self._until_gone(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if the reader is gone."""
        self._until_gone(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _until_gone(self, work: Callable[..., object], *arguments: str) -> None:
        try:
            work(*arguments)
        except OSError:
            # The stream's buffers, and what others write to the descriptor, are discarded too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlive_readers() -> None:
    """Let standard output and error survive their readers; a stream that is None stays None."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LastingStream):
            setattr(sys, name, cast(TextIO, LastingStream(stream)))


class Stopped(BaseException):  # not an Exception: code that reads a sample catches those
    """A signal asked the training to end; `args[0]` is the reason."""


class StopSignal:
    """While entered, records a signal in `reason`; a second Ctrl-C raises KeyboardInterrupt.

    While `at_once` is set, the first one raises `Stopped` wherever the main thread is.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                before = signal.getsignal(number)
                if before == signal.SIG_IGN and number == getattr(signal, "SIGHUP", None):
                    continue  # set by nohup
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"
        if self.at_once:
            self.at_once = False
            raise Stopped(self.reason)
