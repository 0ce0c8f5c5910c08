"""What a mode gets besides the config."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bench:
    """Where a mode writes and reports its progress.

    Args:
        folder: of this benchmark, made already; for whatever the mode keeps besides its findings.
        notice: called with each fallback and each thing left out, as a line.
        progress: called with (what is measured now, done, total) while it goes on.
    """

    folder: Path
    notice: Callable[[str], None]
    progress: Callable[[str, int, int], None]
