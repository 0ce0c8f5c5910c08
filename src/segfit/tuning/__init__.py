"""What fits, what is fastest, why the device idles: one module a mode of benchmark.py.

A mode's module has `run(config, bench) -> Findings`; it measures what `segfit.assembly` makes of the config and the
engine's own step, and re-implements neither.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bench:
    """Where a mode writes and reports its progress."""

    folder: Path  # of this benchmark, made already; for what is kept besides the findings
    notice: Callable[[str], None]  # called with each fallback and each thing left out, as a line
    progress: Callable[[str, int, int], None]  # called with (what is measured now, done, total)
