"""Standard output that survives a closed pipe or terminal."""

import contextlib
import os
import sys
from typing import Any, TextIO, cast


class LastingStream:
    """A text stream with a file descriptor that discards what is written once its pipe or terminal is closed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, or discard the text if the reader is gone."""
        with self._until_gone():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or do nothing if the reader is gone."""
        with self._until_gone():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _until_gone(self) -> Any:
        try:
            yield
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
