"""The findings of benchmark=diagnose: one sentence, tables, a bar."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from matplotlib.figure import Figure

from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.system.monitor import Means
from segfit.tuning.facts import ARITHMETIC, Facts
from segfit.tuning.timeline import OUTSIDE, Timeline
from segfit.tuning.verdict import Prediction, Verdict

ORDER = ("data", "copy", *ARITHMETIC, "logging", "host", *OUTSIDE)
_LABELS = {
    "data": "waiting for data",
    "copy": "copying to the device",
    "augmentation": "augmentation, normalising",
    "logging": "reading and logging",
    "host": "host, the rest",
    "checkpoint": "saving",
}
_COLORS = (
    "#d62728", "#ff9896", "#9467bd", "#1f77b4", "#4c9ed9", "#9ecae9", "#8c564b", "#c7c7c7", "#2ca02c", "#98df8a",
)  # fmt: skip
_NOTABLE = 0.3  # share of the time from which validation or saving is worth a sentence


@dataclass(frozen=True)
class Diagnosis:
    """All that was found out.

    Args:
        facts: that the verdict was made from.
        timeline: of the training as it is.
        means: of the samples that were taken meanwhile.
        verdict: what holds the training up.
        applied: of the training with the change, if it was applied.
        overrides: that the training was composed with.
    """

    facts: Facts
    timeline: Timeline
    means: Means
    verdict: Verdict
    applied: Timeline | None
    overrides: Sequence[str]

    def findings(self) -> Findings:
        """Return tables, figure and sentence."""
        bars = {"as it is": self.timeline}
        if self.applied is not None and self.verdict.best is not None:
            bars[self.verdict.best.change.typed] = self.applied
        tables = [self._phases(), self._sample()]
        if self.verdict.predictions:
            tables.append(self._changes())
        return Findings(
            headline=self.headline(),
            tables=tables,
            values=self._values(),
            figures={"phases": partial(phases_figure, bars)},
            scalars={f"phase/{name}": share for name, share in self.timeline.by_phase().items()},
        )

    def headline(self) -> str:
        """Return the verdict in words."""
        shares = self.timeline.by_phase()
        waiting = shares.get("data", 0.0)
        arithmetic = sum(shares.get(name, 0.0) for name in ARITHMETIC)
        best, name = self.verdict.best, self.verdict.bottleneck
        where = (
            f"{waiting:.0%} of the time waits for data"
            if waiting > arithmetic
            else f"{arithmetic:.0%} of the time is the model's own arithmetic"
        )
        sentences = [f"{where}."]
        if best is None:
            sentences.append(f"Bottleneck: {name}. Nothing that was tried makes it faster.")
        else:
            sentences.append(f"Bottleneck: {name}. Use {best.change.typed}: {self._promise(best)}")
            if best.change.remark:
                sentences.append(f"({best.change.remark})")
        for phase in OUTSIDE:
            if shares.get(phase, 0.0) > _NOTABLE:
                option = "val_every" if phase == "validation" else "checkpoint.every_minutes"
                sentences.append(
                    f"{_label(phase).capitalize()} takes {shares[phase]:.0%} of the time: see {option}."
                )
        if best is not None:
            sentences.append(f"\n{self.command(best)}")
        return " ".join(sentences)

    def command(self, best: Prediction) -> str:
        """Return what trains with the change."""
        new = best.change.options
        kept = [text for text in self.overrides if text.split("=")[0].lstrip("+~") not in new]
        return shlex.join(["python", "train.py", *kept, *best.change.overrides])

    def _promise(self, best: Prediction) -> str:
        if self.applied is None:
            return f"predicted {best.gain:.2f}x."
        return (
            f"predicted {best.gain:.2f}x, measured {self.applied.rate / self.timeline.rate:.2f}x."
        )

    def _phases(self) -> Table:
        timeline, shares = self.timeline, self.timeline.by_phase()
        columns = [Column("phase"), Column("ms an update", ".2f"), Column("% of the time", ".1f")]
        rows: list[list[Cell]] = []
        for name in (name for name in ORDER if name in shares):
            seconds = shares[name] * timeline.seconds / timeline.updates
            rows.append([_label(name), 1000 * seconds, 100 * shares[name]])
            if timeline.device:
                there = name in timeline.device and name in ("copy", *ARITHMETIC)
                rows[-1].append(1000 * timeline.device[name] / timeline.updates if there else None)
        if timeline.device:
            columns.append(Column("device ms", ".2f"))
        title = (
            f"{timeline.updates} updates of {timeline.samples:g} samples, {timeline.epochs} epochs begun: "
            f"{1000 * timeline.update:.1f} ms an update, {timeline.rate:.1f} samples/s without validation and saving"
        )
        return Table("phases", title, columns, rows)

    def _sample(self) -> Table:
        costs = self.facts.costs
        rows = [
            ("waiting for the disk", 1000 * costs.wait),
            ("decoding", 1000 * costs.decode),
            ("fitting to image_size", 1000 * costs.fit),
            ("augmenting", 1000 * costs.augment),
        ]
        title = f"a sample of the {self.facts.workers} workers, in one process"
        if self.facts.workers == 0:
            title = "a sample, in the main process"
        return Table("sample", title, (Column("part"), Column("ms", ".2f")), rows)

    def _changes(self) -> Table:
        columns = (
            Column("cures"),
            Column("change"),
            Column("predicted gain", ".2f"),
            Column("remark"),
        )
        rows = [
            (one.change.name, one.change.typed, one.gain, one.change.remark or None)
            for one in self.verdict.predictions
        ]
        emphasis = 0 if self.verdict.best is not None else None
        return Table("changes", "what might help", columns, rows, emphasis)

    def _values(self) -> Mapping[str, object]:
        best = self.verdict.best
        return {
            "bottleneck": self.verdict.bottleneck,
            "change": best and dict(text.split("=", 1) for text in best.change.overrides),
            "command": self.command(best) if best is not None else None,
            "predicted_gain": best.gain if best is not None else None,
            "measured_gain": self.applied and self.applied.rate / self.timeline.rate,
            "facts": asdict(self.facts),
            "timeline": asdict(self.timeline),
            "applied": asdict(self.applied) if self.applied is not None else None,
            "device": {"mean": self.means.mean, "peak": self.means.peak},
        }


def phases_figure(timelines: Mapping[str, Timeline]) -> Figure:
    """Draw a stacked bar of milliseconds per sample for each timeline, by phase."""
    figure = Figure(figsize=(9, 1.8 + 0.7 * len(timelines)), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    labels = list(timelines)[::-1]
    starts = [0.0] * len(labels)
    for name, color in zip(ORDER, _COLORS, strict=True):
        widths = [_ms_a_sample(timelines[label], name) for label in labels]
        axes.barh(labels, widths, left=starts, color=color, label=_label(name), height=0.6)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_xlabel("ms a sample")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure


def _ms_a_sample(timeline: Timeline, name: str) -> float:
    seconds = timeline.by_phase().get(name, 0.0) * timeline.seconds
    return 1000 * seconds / (timeline.updates * timeline.samples)


def _label(name: str) -> str:
    return _LABELS.get(name, name)
