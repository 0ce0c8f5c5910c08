"""Where the time of a training goes: the loop names its phases, and a `Recorder` can time them.

    with phase("forward"):
        outputs = model(inputs)

costs 0.15 microseconds, or 0.7 while a `Recorder` is entered. It reads the host's clock and, on CUDA, records two
events for each phase, which it reads only at the end: the training never waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

_recorder: Recorder | None = None


_UNTIMED = nullcontext()


def phase(name: str, *, whole: bool = False) -> AbstractContextManager[None]:
    """Return a context that is timed under `name` while a `Recorder` is entered; otherwise it does nothing.

    Args:
        name: of the phase. The time of a phase inside another is not part of the outer one's own time.
        whole: phases inside are not timed; their time is part of this one's.
    """
    return _UNTIMED if _recorder is None else _recorder.time(name, whole)


@dataclass
class Span:
    """One pass through a phase.

    Args:
        name: of the phase.
        start: seconds on the host's clock since the recorder was entered.
        end: the same.
        inner: seconds of it in phases inside.
        device_start: seconds on the device's clock since the recorder was entered; None on the CPU.
        device_end: the same.
    """

    name: str
    start: float
    end: float
    inner: float = 0.0
    device_start: float | None = None
    device_end: float | None = None

    @property
    def own(self) -> float:
        """Seconds on the host without the phases inside."""
        return self.end - self.start - self.inner


class Recorder:
    """Records the phases of this process while it is entered; only one at a time.

    Args:
        cuda: also record the device's time, on the current CUDA stream.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        self._event: Callable[[], Any] = _cuda_event if cuda else _no_event
        self._open: list[_Timed] = []
        self._done: list[_Timed] = []
        self._begun, self._begin_event = 0.0, None

    def __enter__(self) -> Recorder:
        global _recorder  # so that the loop need not pass a recorder through every call
        if _recorder is not None:
            raise RuntimeError("phases are recorded already")
        self._begin_event = self._event()
        self._begun = time.perf_counter()
        _recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        global _recorder
        _recorder = None

    def __len__(self) -> int:
        """Return how many passes are over."""
        return len(self._done)

    def seconds(self) -> float:
        """Return the seconds since the recorder was entered."""
        return time.perf_counter() - self._begun

    def time(self, name: str, whole: bool) -> AbstractContextManager[None]:
        """Return the context that `phase` gives."""
        if self._open and self._open[-1].whole:
            return _UNTIMED
        return _Timed(name, whole, self._event, self._open, self._done)

    def spans(self) -> list[Span]:
        """Return all passes that are over, in the order of their ends; synchronises on CUDA."""
        if self._begin_event is not None:
            import torch

            torch.cuda.synchronize()
        return [timed.span(self._begun, self._begin_event) for timed in self._done]


class _Timed:
    """One pass: reads the clocks and does nothing else."""

    __slots__ = ("_done", "_event", "_open", "end", "events", "inner", "name", "start", "whole")

    def __init__(
        self,
        name: str,
        whole: bool,
        event: Callable[[], Any],
        still_open: list[_Timed],
        done: list[_Timed],
    ) -> None:
        self.name, self.whole, self._event = name, whole, event
        self._open, self._done = still_open, done
        self.start = self.end = self.inner = 0.0
        self.events: list[Any] = []

    def __enter__(self) -> None:
        self._open.append(self)
        self.events.append(self._event())
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.end = time.perf_counter()
        self.events.append(self._event())
        self._open.pop()
        if self._open:
            self._open[-1].inner += self.end - self.start
        self._done.append(self)

    def span(self, begun: float, begin_event: Any) -> Span:
        span = Span(self.name, self.start - begun, self.end - begun, self.inner)
        if begin_event is not None:
            first, last = (begin_event.elapsed_time(event) / 1000 for event in self.events)
            span.device_start, span.device_end = first, last
        return span


def _no_event() -> None:
    return None


def _cuda_event() -> Any:
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
