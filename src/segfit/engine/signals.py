"""Ctrl-C, SIGTERM, a closed terminal and what Slurm sends end a training at its next safe point."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# SIGUSR1 and SIGUSR2 are how Slurm and submitit say that time is up, or that others need the card; SIGHUP is a terminal
# that was closed.
_STOPPING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)  # not on Windows
)


class StopSignal:
    """While entered, remembers a signal instead of dying of it; a second Ctrl-C is no longer held back."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in _STOPPING:
                before = signal.getsignal(number)
                if before == signal.SIG_IGN and number == getattr(signal, "SIGHUP", None):
                    continue  # nohup asked for that
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"
