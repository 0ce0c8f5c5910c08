"""What trainings need of a card, from a table that benchmark=plan made: a plan itself takes too long to start with."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

LEAST_BATCH = 4  # of a model that is said to fit, too
# Of the memory that is free, a recipe that nobody chose takes so much at most: nothing of it was measured on this card, where
# others draw a desktop, and images to validate on may be larger.
CAREFUL = 0.6


@dataclass(frozen=True)
class Needs:
    """GiB that training a model takes in 16 bits, margin and context of the plan included; docs/benchmarks/cards.py."""

    fixed: float
    each: float  # of a number that the model gets
    gradients: float  # kept between micro-batches
    waiting: float  # of a number of a micro-batch that waits

    def gib(self, numbers: int, batch: int, accumulate: int = 1) -> float:
        """Return what micro-batches take whose samples have so many numbers each."""
        more, numbers = accumulate - 1, numbers * batch
        kept = self.gradients if more else 0.0
        return self.fixed + kept + numbers * (self.each + more * self.waiting)


@cache
def _table() -> Any:
    return json.loads(Path(__file__).with_name("cards.json").read_text(encoding="utf-8"))


def needs_of(task: str, model: str) -> Needs | None:
    """Return what a model needs, by its choice and its unusual options; None: it is not in the table."""
    found = _table()["models"].get(task, {}).get(model)
    return Needs(**found) if found else None


def careful(task: str, tier: str, recipe: Any, free_gib: float) -> dict[str, Any]:
    """Return what to change of a recipe so that it leaves room on a card: smaller micro-batches, as many samples an update."""
    model, numbers = _table()["recipes"].get(task, {}).get(tier, ("", 0))
    needs, batch, accumulate = needs_of(task, model), recipe.batch_size, recipe.get("accumulate", 1)
    if needs is None or (before := needs.gib(numbers, batch, accumulate)) <= CAREFUL * free_gib:
        return {}
    while batch % 2 == 0 and needs.gib(numbers, batch, accumulate) > CAREFUL * free_gib:
        batch, accumulate = batch // 2, accumulate * 2
    usual = f"{recipe.batch_size} and {recipe.get('accumulate', 1)}"
    taken = f"{needs.gib(numbers, batch, accumulate):.1f} instead of {before:.1f} GiB"
    note = f"batch_size={batch} accumulate={accumulate} instead of {usual}: takes {taken} by plan"
    return {"batch_size": batch, "accumulate": accumulate, "hardware": {"note": note}}


def share_of_card(
    task: str, model: str, numbers: int, batch: int, accumulate: int, gib: float
) -> str:
    """Return what a training will take of a card of so many GiB, if that is known, and what would fill it."""
    needs, parts = needs_of(task, model), []
    if needs is not None:
        taken = needs.gib(numbers, batch, accumulate)
        parts.append(f"{taken:.1f} of {gib:.1f} GiB by plan, {taken / gib:.0%} of the card")
    numbers, size = _table()["filling"].get(task, (0, ""))
    fitting = []
    for name, values in _table()["models"].get(task, {}).items() if numbers else ():
        other = Needs(**values)
        most = int((gib - other.fixed) / (other.each * numbers))
        if most >= LEAST_BATCH:
            fitting.append((other.each, f"also fits: {name} at {size}, batch {most}"))
    return "; ".join([*parts, *(text for _, text in sorted(fitting)[-1:])])
