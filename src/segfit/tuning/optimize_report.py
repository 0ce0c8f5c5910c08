"""The findings of benchmark=optimize."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from omegaconf import DictConfig

from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.tuning.climb import SPEED_COLUMNS, Step, bars
from segfit.tuning.local_recipe import LOCAL

_COLUMNS = (
    Column("setting"),
    Column("samples/s", ".1f"),
    Column("× composed", ".2f"),
    Column("verdict"),
    *SPEED_COLUMNS,
)


@dataclass(frozen=True)
class Result:
    """What came out.

    Args:
        changes: of the composed recipe, as they are typed.
        composed: samples per second of the composed recipe; None: it does not fit.
        fastest: samples per second of the result; None: time ran out.
        composed_batch: effective batch of the composed recipe.
        effective: that of the result.
        fitting: the largest micro-batch, up to the effective batch, that fits.
        tuned_for: what it holds for.
        out: the file that was written.
    """

    changes: str
    composed: float | None
    fastest: float | None
    composed_batch: int
    effective: int
    fitting: int
    tuned_for: Mapping[str, str | None]
    out: str

    @property
    def gain(self) -> float | None:
        """How many times as fast as the composed recipe."""
        if self.composed is None or self.fastest is None:
            return None
        return self.fastest / self.composed

    def figures(self) -> str:
        """Return what was measured, in a line."""
        if not self.changes:
            return "Nothing was found that is faster than the composed recipe."
        now = "not measured to the end" if self.fastest is None else f"{self.fastest:.1f} samples/s"
        if self.gain is None:
            return (
                f"The composed recipe does not fit, or was not measured; {now} with {self.changes}"
            )
        return (
            f"{self.gain:.2f} times as fast as the composed recipe: {self.composed:.1f} → {now} with "
            f"{self.changes}"
        )

    def remarks(self) -> list[str]:
        """Return what else the user has to know, a line each."""
        if self.effective == self.composed_batch:
            return []
        return [
            f"The effective batch is {self.effective}, no longer {self.composed_batch}; lr is as it was: "
            f"benchmark=lr_find says which goes with it."
        ]


def findings_of(config: DictConfig, steps: Sequence[Step], result: Result) -> Findings:
    """Return the table, the figure and the headline."""
    facts: Mapping[str, str] = next((step.facts for step in steps if step.facts), {})
    title = f"{facts.get('model', config.model.name)}, {facts.get('sample', '')}"
    device = result.tuned_for["device"]
    written = f"Written to {result.out}"
    if Path(result.out) == LOCAL:
        written += ". Use it: python train.py hardware=local"
    composed = steps[0].rate
    labels = [
        " ".join([*([] if step.rate is None else [f"{step.rate:.1f} "]), step.verdict])
        for step in steps
    ]
    scalars = {"optimize/samples_per_second": result.fastest or 0.0}
    if result.gain is not None:
        scalars["optimize/gain"] = result.gain
    return Findings(
        headline="\n".join([result.figures(), *result.remarks(), written]),
        tables=[
            Table(
                "trials",
                f"{title}: each on top of those that were kept above it",
                _COLUMNS,
                [_row(step, composed) for step in steps],
            )
        ],
        values={
            **asdict(result),
            "gain": result.gain,
            "trials": [{**asdict(step), "facts": dict(step.facts)} for step in steps],
        },
        figures={"optimize": partial(bars, steps, labels, f"{title}\n{device}")},
        scalars=scalars,
    )


def _row(step: Step, composed: float | None) -> list[Cell]:
    times = step.rate / composed if step.rate is not None and composed else None
    return [step.change.name, step.rate, times, step.verdict, *step.cells()]
