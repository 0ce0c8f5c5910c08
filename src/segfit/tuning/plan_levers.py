"""What makes a training fit that does not."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from omegaconf import DictConfig

from segfit.config.tasks import schema_of
from segfit.tuning.change import Change, changed
from segfit.tuning.memory.curve import Forecast
from segfit.tuning.memory.planner import Card, forecast_of, planned_precision

TRIES = 3  # image sizes that are recorded until one fits


@dataclass(frozen=True)
class Lever:
    """A change of the config and what it does to memory.

    Args:
        change: as it is typed.
        effect: what else it does.
        needed: bytes of the card, margin and context included.
        fits: whether the card has them.
        largest: the largest micro-batch that fits then; 0: none.
    """

    change: str
    effect: str
    needed: float
    fits: bool
    largest: int


def levers(
    config: DictConfig, card: Card, forecast: Forecast, progress: Callable[[str, int, int], None]
) -> list[Lever]:
    """Return what lowers the memory of a config that does not fit, the least costly first."""
    found: list[Lever] = []
    kinds = (_smaller_batch, _lower_precision, _checkpointing, _smaller_samples)
    for done, kind in enumerate(kinds):
        progress("looking for what helps", done, len(kinds))
        found += [_lever(config, card, change) for change in kind(config, card, forecast)]
    return found


def _smaller_batch(config: DictConfig, card: Card, _: Forecast) -> Iterator[Change]:
    # gradients stay alive between micro-batches
    two = changed(config, {"accumulate": max(config.accumulate, 2)})
    largest = int(
        min(forecast_of(two, card.device_type).largest(card.budget), config.batch_size - 1)
    )
    if largest < 1:
        return
    samples = config.batch_size * config.accumulate
    batch = next((size for size in range(largest, 0, -1) if samples % size == 0), 1)
    effect = f"the effective batch stays {samples}; a little slower"
    while True:
        options = {"batch_size": batch, "accumulate": math.ceil(samples / batch)}
        change = Change("smaller batch", options, effect)
        if batch == 1 or _lever(config, card, change).fits:
            break
        batch -= 1  # a longer window keeps more samples
    yield change


def _lower_precision(config: DictConfig, card: Card, _: Forecast) -> Iterator[Change]:
    if card.device_type == "cuda" and planned_precision(config, "cuda") == "fp32":
        yield Change("precision", {"precision": "auto"}, "16-bit products; faster, too")


def _checkpointing(config: DictConfig, _card: Card, _: Forecast) -> Iterator[Change]:
    if not config.model.get("checkpointing", True):
        effect = "recomputes activations: about 30 % slower"
        yield Change("checkpointing", {"model.checkpointing": True}, effect)


def _smaller_samples(config: DictConfig, card: Card, forecast: Forecast) -> Iterator[Change]:
    """Yield the largest samples that fit: guessed by their share, then recorded."""
    fixed = forecast.peak(0)
    spare = (card.budget - fixed) / max(forecast.peak(config.batch_size) - fixed, 1)
    if spare <= 0:
        return
    smaller = schema_of(config.task.name).smaller_samples(config, spare)
    for options, effect in islice(smaller, TRIES):
        change = Change("smaller samples", options, effect)
        if _lever(config, card, change).fits:
            yield change
            return


def _lever(config: DictConfig, card: Card, change: Change) -> Lever:
    new = changed(config, change.options)
    forecast = forecast_of(new, card.device_type)
    peak = forecast.peak(new.batch_size)
    needed, largest = card.needed(peak), card.largest(forecast)
    return Lever(change.typed, change.remark, needed, peak <= card.budget, largest)
