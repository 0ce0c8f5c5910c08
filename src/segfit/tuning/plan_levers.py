"""What makes a training fit that does not."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from omegaconf import DictConfig

from segfit.config.check import size_of
from segfit.tuning.memory.curve import Forecast
from segfit.tuning.memory.planner import Card, forecast_of, planned_precision

STEP = 32  # sides of images are tried in multiples of it
TRIES = 3  # image sizes that are recorded until one fits


@dataclass(frozen=True)
class Lever:
    """A change of the config.

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
    kinds = (_smaller_batch, _lower_precision, _checkpointing, _smaller_images)
    for done, kind in enumerate(kinds):
        progress("looking for what helps", done, len(kinds))
        found += kind(config, card, forecast)
    return found


def _smaller_batch(config: DictConfig, card: Card, _: Forecast) -> Iterator[Lever]:
    changed = copy.deepcopy(config)
    changed.accumulate = max(config.accumulate, 2)  # gradients stay alive between micro-batches
    forecast = forecast_of(changed, card.device_type)
    batch = min(forecast.largest(card.budget), config.batch_size - 1)
    if batch < 1:
        return
    images = config.batch_size * config.accumulate
    batch = next((size for size in range(int(batch), 0, -1) if images % size == 0), 1)
    changed.accumulate = math.ceil(images / batch)
    forecast = forecast_of(changed, card.device_type)
    while batch > 1 and forecast.peak(batch) > card.budget:  # a longer window keeps more images
        batch -= 1
        changed.accumulate = math.ceil(images / batch)
        forecast = forecast_of(changed, card.device_type)
    effect = f"the effective batch stays {images}; a little slower"
    yield _lever(
        f"batch_size={batch} accumulate={changed.accumulate}", effect, forecast, batch, card
    )


def _lower_precision(config: DictConfig, card: Card, _: Forecast) -> Iterator[Lever]:
    if card.device_type != "cuda" or planned_precision(config, "cuda") != "fp32":
        return
    forecast = forecast_of(config, "cuda", precision="bf16")
    yield _lever(
        "precision=auto", "16-bit products; faster, too", forecast, config.batch_size, card
    )


def _checkpointing(config: DictConfig, card: Card, _: Forecast) -> Iterator[Lever]:
    if config.model.get("checkpointing", True):
        return
    changed = copy.deepcopy(config)
    changed.model.checkpointing = True
    forecast = forecast_of(changed, card.device_type)
    effect = "recomputes activations: about 30 % slower"
    yield _lever("model.checkpointing=true", effect, forecast, config.batch_size, card)


def _smaller_images(config: DictConfig, card: Card, forecast: Forecast) -> Iterator[Lever]:
    """Yield the largest size that fits: guessed by area, then recorded."""
    height, width = size_of(config.image_size)
    fixed = forecast.peak(0)
    spare = (card.budget - fixed) / max(forecast.peak(config.batch_size) - fixed, 1)
    if spare <= 0:
        return
    scale = min(math.sqrt(spare), 0.99)
    rows, columns = (int(side * scale) // STEP * STEP for side in (height, width))
    for _ in range(TRIES):
        if min(rows, columns) < 2 * STEP:
            return
        changed = copy.deepcopy(config)
        changed.image_size = rows if rows == columns else [rows, columns]
        lever = _lever(
            f"image_size={changed.image_size}".replace(" ", ""),
            "small things are lost",
            forecast_of(changed, card.device_type),
            config.batch_size,
            card,
        )
        if lever.fits:
            yield lever
            return
        rows, columns = rows - STEP, columns - STEP


def _lever(change: str, effect: str, forecast: Forecast, batch: int, card: Card) -> Lever:
    peak = forecast.peak(batch)
    largest = int(min(forecast.largest(card.budget), 4096))
    return Lever(change, effect, card.needed(peak), peak <= card.budget, largest)
