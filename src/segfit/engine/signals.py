"""Ctrl-C, SIGTERM, a closed terminal and Slurm's signals end a training after the present update, a validation at once."""

import signal
import threading
from types import FrameType
from typing import Any

from segfit.system.process import STOPPING


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
