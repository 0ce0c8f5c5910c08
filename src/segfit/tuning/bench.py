"""What a mode gets besides the config."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bench:
    """Where a mode writes and reports its progress."""

    folder: Path  # of this benchmark, made already; for what is kept besides the findings
    notice: Callable[[str], None]  # called with each fallback and each thing left out, as a line
    progress: Callable[[str, int, int], None]  # called with (what is measured now, done, total)
