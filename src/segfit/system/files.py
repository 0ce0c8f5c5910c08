"""Text files that are whole or not there."""

import os
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Write a file, all or nothing: a process that is killed meanwhile leaves the old one.

    Raises:
        OSError: if it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # the name must not get to the disk before the content
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
