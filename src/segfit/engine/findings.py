"""What an evaluation or a benchmark found: scores, tables, figures, pictures. The same for every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing them takes time that findings without figures do not need
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

Cell = str | float | int | bool | None


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    name: str  # its heading, unit included: "ms", "peak GiB"
    spec: str = ""  # how its numbers are printed (format specification); files keep them whole


def columns(head: str) -> list[Column]:
    """Return the columns of a table's head, names with a format specification where they have one: "step | ms:.1f | GiB:.2f"."""
    return [Column(*cell.strip().split(":")) for cell in head.split("|")]


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words."""

    name: str  # short, of letters, digits, "-" and "_"; the CSV file is called so
    title: str  # above the table; may be empty
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]  # numbers stay numbers; None is an absent value
    emphasis: int | None = None  # index of the row that the headline is about
    totals: Sequence[Sequence[Cell]] = ()  # sums of the others: below a line, not in the CSV
    # One RGB triple (0-255) a row, for a coloured square before its first cell on screen.
    colors: Sequence[tuple[int, int, int]] | None = None
    caption: str = ""  # below the table


@dataclass(frozen=True)
class Findings:
    """The result of one pass over held-out data, or the answer of a mode of benchmark.py."""

    headline: str = ""  # the answer in a sentence or two; printed last
    scores: Mapping[str, float] = field(default_factory=dict)  # NaN where undefined
    tables: Sequence[Table] = ()  # printed, and a CSV file each
    # All else that was measured, for the JSON file: plain values, lists, dicts and arrays.
    values: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)  # a PNG file each
    scalars: Mapping[str, float | None] = field(default_factory=dict)  # TensorBoard tag → number
    # Sample name → draws its picture, (H, W, 3) uint8 RGB.
    panels: Mapping[str, Callable[[], NDArray[np.uint8]]] = field(default_factory=dict)
    seconds: float = 0.0  # wall-clock time of the pass
