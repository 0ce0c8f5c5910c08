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
    """A column of a table.

    Args:
        name: its heading, unit included: "ms", "peak GiB".
        spec: how its numbers are printed (format specification); CSV and JSON keep them whole.
    """

    name: str
    spec: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words.

    Args:
        name: short, of letters, digits, "-" and "_"; the CSV file is called so.
        title: above the table; may be empty.
        columns: one a cell.
        rows: numbers stay numbers; None is an absent value.
        emphasis: index of the row that the headline is about, or None.
        totals: rows that sum up the others: on screen below a line, not in the CSV file.
        colors: one RGB triple (0-255) a row, for a coloured square before its first cell on screen, or None.
        caption: below the table; may be empty.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    emphasis: int | None = None
    totals: Sequence[Sequence[Cell]] = ()
    colors: Sequence[tuple[int, int, int]] | None = None
    caption: str = ""


@dataclass(frozen=True)
class Findings:
    """The result of one pass over held-out data, or the answer of a mode of benchmark.py.

    Args:
        headline: the answer in a sentence or two; printed last.
        scores: name → number; NaN where undefined.
        tables: printed, and a CSV file each.
        values: everything else that was measured, for the JSON file: plain values, lists, dicts and arrays.
        figures: name → draws the figure; a PNG file each.
        scalars: TensorBoard tag → number; None is an absent value.
        panels: sample name → draws its picture, (H, W, 3) uint8 RGB.
        seconds: wall-clock time of the pass.
    """

    headline: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Callable[[], Figure]] = field(default_factory=dict)
    scalars: Mapping[str, float | None] = field(default_factory=dict)
    panels: Mapping[str, Callable[[], NDArray[np.uint8]]] = field(default_factory=dict)
    seconds: float = 0.0
