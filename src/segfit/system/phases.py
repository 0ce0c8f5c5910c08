"""Where a training's time goes: the loop names its phases, and somebody may record them.

    with phase("forward"):
        outputs = model(inputs)

costs 0.15 microseconds as long as nobody does, 0.7 while somebody does. A `Recorder` takes the host's clock and, on
CUDA, two events a phase, which it reads only when all is over: nothing that is timed waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

_recorder: Recorder | None = None


class _Untimed:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


_UNTIMED = _Untimed()


def phase(name: str, *, whole: bool = False) -> AbstractContextManager[None]:
    """Return a context that is timed under `name` while a `Recorder` is entered, else does nothing.

    Args:
        name: of the phase. A phase inside another is taken out of the outer one's own time.
        whole: phases inside are not told apart: theirs is this one's time.
    """
    return _UNTIMED if _recorder is None else _recorder.time(name, whole)


@dataclass
class Span:
    """One passage through a phase.

    Args:
        name: of the phase.
        start: seconds on the host's clock since the recorder was entered.
        end: the same.
        inner: seconds of it that phases inside took.
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
        """Seconds on the host without those of phases inside."""
        return self.end - self.start - self.inner


class Recorder:
    """Records the phases of this process while it is entered; one at a time.

    Args:
        cuda: also take the device's time, of the current CUDA device's current stream.
    """

    def __init__(self, *, cuda: bool = False) -> None:
        self._event: Callable[[], Any] = _cuda_event if cuda else _no_event
        self._open: list[_Timed] = []
        self._done: list[_Timed] = []
        self._begun, self._begin_event = 0.0, None

    def __enter__(self) -> Recorder:
        global _recorder  # so that the loop need not carry a recorder through every call
        if _recorder is not None:
            raise RuntimeError("phases are recorded already")
        self._begin_event = self._event()
        self._begun = time.perf_counter()
        _recorder = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _recorder
        _recorder = None

    def __len__(self) -> int:
        """Return how many passages are over."""
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
        """Return all passages that are over, in the order of their ends; synchronises on CUDA."""
        if self._begin_event is not None:
            import torch

            torch.cuda.synchronize()
        return [timed.span(self._begun, self._begin_event) for timed in self._done]


class _Timed:
    """One passage: it has no more to do than to look at the clocks."""

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
