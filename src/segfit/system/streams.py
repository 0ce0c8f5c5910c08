"""Standard output that outlives whoever reads it."""

import contextlib
import os
import sys
from typing import Any, TextIO, cast


class LastingStream:
    """A text stream that goes on into nothing when its reader is gone: a pipe that was closed, a terminal that was.

    Args:
        stream: with a file descriptor; everything but writing is its own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write as the stream does, or to nobody."""
        with self._until_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush as the stream does, or to nobody."""
        with self._until_gone():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _until_gone(self) -> Any:
        try:
            yield
        except OSError:
            # What is still in the stream's buffers, and what others write to the descriptor, ends there too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def outlive_readers() -> None:
    """Make standard output and error last; a stream that was closed from the start stays None."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, LastingStream):
            setattr(sys, name, cast(TextIO, LastingStream(stream)))
