"""How the findings of benchmark=optimize are told."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import DictConfig

from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.tuning.attempts import KEPT, Attempt
from segfit.tuning.local_recipe import LOCAL

_COLUMNS = (
    Column("setting"),
    Column("img/s", ".1f"),
    Column("× composed", ".2f"),
    Column("verdict"),
    Column("ms", ".1f"),
    Column("wait %", ".1f"),
    Column("GiB", ".2f"),
)


@dataclass(frozen=True)
class Result:
    """What came out.

    Args:
        changes: of the composed recipe, as they are typed.
        composed: images a second of the composed recipe; None: it does not fit.
        fastest: images a second of the result; None: time ran out.
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
        now = "not measured to the end" if self.fastest is None else f"{self.fastest:.1f} images/s"
        if self.gain is None:
            return (
                f"The composed recipe does not fit, or was not measured; {now} with {self.changes}"
            )
        return (
            f"{self.gain:.2f} times as fast as the composed recipe: {self.composed:.1f} → {now} with "
            f"{self.changes}"
        )

    def remarks(self) -> list[str]:
        """Return what else the person has to know, a line each."""
        if self.effective == self.composed_batch:
            return []
        return [
            f"The effective batch is {self.effective}, no longer {self.composed_batch}; lr is as it was: "
            f"benchmark=lr_find says which goes with it."
        ]


def findings_of(config: DictConfig, made: Sequence[Attempt], result: Result) -> Findings:
    """Return the table, the figure and the headline."""
    facts: Mapping[str, str] = next((item.facts for item in made if item.facts), {})
    title = f"{facts.get('model', config.model.name)}, {facts.get('image size', '')}"
    device = result.tuned_for["device"]
    written = f"Written to {result.out}"
    if Path(result.out) == LOCAL:
        written += ". Use it: python train.py hardware=local"
    composed = made[0].rate
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
                [_row(item, composed) for item in made],
            )
        ],
        values={
            **asdict(result),
            "gain": result.gain,
            "trials": [{**asdict(item), "facts": dict(item.facts or {})} for item in made],
        },
        figures={"optimize": partial(figure, made, f"{title}\n{device}")},
        scalars=scalars,
    )


def _row(item: Attempt, composed: float | None) -> list[Cell]:
    speed = item.speed
    if speed is None:
        return [item.setting.name, None, None, item.verdict, None, None, None]
    rate = speed.samples_per_second
    return [
        item.setting.name,
        rate,
        rate / composed if composed else None,
        item.verdict,
        speed.ms_median,
        100 * speed.data_wait,
        speed.peak_gib,
    ]


def figure(made: Sequence[Attempt], title: str) -> Figure:
    """Draw a bar a trial: images a second, what was kept in blue."""
    drawing = Figure(figsize=(9, 0.4 * len(made) + 1.3), dpi=100, layout="constrained")
    axes = drawing.add_subplot()
    rates = [item.rate or 0.0 for item in made]
    colors = ["#3a7ca5" if item.verdict == KEPT else "#c8c8c8" for item in made]
    axes.barh(range(len(made)), rates, color=colors)
    for place, item in enumerate(made):
        words = item.verdict if len(item.verdict) <= 60 else f"{item.verdict[:59]}…"
        label = words if item.rate is None else f"{item.rate:.1f}   {words}"
        axes.text(rates[place], place, f" {label}", va="center")
    axes.set_yticks(range(len(made)), [item.setting.name for item in made])
    axes.set_ylim(len(made) - 0.5, -0.5)
    axes.set_xlim(0, 1.5 * max([*rates, 1e-9]))  # room for the words beside the longest bar
    axes.set_xlabel("images a second in training")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return drawing
