"""What a benchmark found: one sentence, tables, figures, numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # importing it takes time that a mode without figures does not need
    from matplotlib.figure import Figure

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
        name: short, of letters, digits and "-"; the CSV file is called so.
        title: above the table.
        columns: one a cell.
        rows: numbers stay numbers; None is an absent value.
        emphasis: index of the row that the headline is about, or None.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    emphasis: int | None = None


@dataclass(frozen=True)
class Findings:
    """The answer of a mode.

    Args:
        headline: the answer in a sentence or two; printed last.
        tables: printed, and a CSV file each.
        values: everything that was measured, for results.json: plain values, lists and dicts.
        figures: file name without suffix → figure, a PNG each.
        scalars: tag → number, for TensorBoard.
    """

    headline: str
    tables: Sequence[Table] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    figures: Mapping[str, Figure] = field(default_factory=dict)
    scalars: Mapping[str, float] = field(default_factory=dict)
