"""Where the time of a training goes: the loop names its phases, and a `Recorder` can time them.

    with phase("forward"):
        outputs = model(inputs)

costs 0.15 microseconds, or a few while a `Recorder` is entered. It reads the host's clock and, on CUDA, records two
events for each phase, which it reads only at the end: the training never waits for the device.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

_recorder: Recorder | None = None
_UNTIMED = nullcontext()


def phase(name: str, *, whole: bool = False) -> AbstractContextManager[None]:
    """Return a context that is timed under `name` while a `Recorder` is entered; otherwise it does nothing.

    The time of a phase inside another is not part of the outer one's own time. With `whole`, phases inside are not timed:
    their time is part of this one's.
    """
    return _UNTIMED if _recorder is None else _recorder.time(name, whole)


@dataclass
class Span:
    """One pass through a phase; seconds since the recorder was entered."""

    name: str
    start: float  # on the host's clock
    end: float
    inner: float = 0.0  # seconds in phases inside
    device: float | None = (
        None  # seconds from its first work on the device to its last; None on the CPU
    )

    @property
    def own(self) -> float:
        """Seconds on the host without the phases inside."""
        return self.end - self.start - self.inner


class Recorder:
    """Records the phases of this process while it is entered; only one at a time. With `cuda`, also the device's time, on the current CUDA stream."""

    def __init__(self, *, cuda: bool = False) -> None:
        self._cuda = cuda
        self._spans: list[Span] = []
        self._events: list[tuple[Any, Any]] = []  # at the start and the end of each span
        self._whole, self._inner = False, 0.0  # of the phase that is open
        self._begun = 0.0

    def __enter__(self) -> Recorder:
        global _recorder  # so that the loop need not pass a recorder through every call
        if _recorder is not None:
            raise RuntimeError("phases are recorded already")
        self._begun = time.perf_counter()
        _recorder = self
        return self

    def __exit__(self, *_: object) -> None:
        global _recorder
        _recorder = None

    def __len__(self) -> int:
        """Return how many passes are over."""
        return len(self._spans)

    def seconds(self) -> float:
        """Return the seconds since the recorder was entered."""
        return time.perf_counter() - self._begun

    @contextmanager
    def time(self, name: str, whole: bool) -> Iterator[None]:
        """Return the context that `phase` gives."""
        if self._whole:
            yield
            return
        outer, self._inner, self._whole = self._inner, 0.0, whole
        first, start = self._event(), self.seconds()
        try:
            yield
        finally:
            end = self.seconds()
            self._events.append((first, self._event()))
            self._spans.append(Span(name, start, end, self._inner))
            self._inner, self._whole = outer + end - start, False

    def spans(self) -> list[Span]:
        """Return all passes that are over, in the order of their ends; synchronises on CUDA."""
        if self._cuda:
            import torch

            torch.cuda.synchronize()
            for span, (first, last) in zip(self._spans, self._events, strict=True):
                span.device = first.elapsed_time(last) / 1000
        return self._spans

    def _event(self) -> Any:
        if not self._cuda:
            return None
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
