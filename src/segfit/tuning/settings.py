"""Which settings benchmark=optimize tries, and which of them it keeps. Nothing here measures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

LEAST_EFFECTIVE = 8  # a smaller batch trains neither fast nor, with batch norm, well
LEAST_GAIN = 1.02  # what is less is chance


@dataclass(frozen=True)
class Setting:
    """A change of the composition.

    Args:
        name: for tables and figures.
        changes: config key → value.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)


# Tries a setting on top of what is kept: images a second, or None if it cannot be trained.
Try = Callable[[Setting], float | None]


def effective_batch(config: DictConfig, images: int) -> int:
    """Return the effective batch of the result: benchmark.effective_batch, else the composed one, at least 8.

    Args:
        config: of benchmark.py.
        images: to train on.
    """
    if config.benchmark.effective_batch is not None:
        return int(config.benchmark.effective_batch)
    composed = int(config.batch_size * config.accumulate)
    return max(composed, min(LEAST_EFFECTIVE, images))


def micro_batches(effective: int, most: int) -> list[int]:
    """Return micro-batches up to `most` that divide the effective batch, each at least 1.5 times the one before."""
    chosen: list[int] = []
    for batch in range(1, min(effective, most) + 1):
        if effective % batch == 0 and (not chosen or batch >= 1.5 * chosen[-1]):
            chosen.append(batch)
    return chosen


def micro_batch(batch: int, effective: int) -> Setting:
    """Return the setting of a micro-batch; accumulation keeps the effective batch."""
    return Setting(
        f"batch_size={batch} × {effective // batch}",
        {"batch_size": batch, "accumulate": effective // batch},
    )


def best_micro_batch(
    batches: Sequence[int], start: int, effective: int, attempt: Try
) -> tuple[int, float] | None:
    """Return the micro-batch at which images a second stop rising, and them; None if none can be trained.

    `start`, or the nearest that is smaller, is tried first; from there larger ones while they are faster, and if none
    was, smaller ones while they are.

    Args:
        batches: ascending.
        start: of the composed recipe.
        effective: batch, a multiple of each.
        attempt: tries one.
    """
    place = max(sum(batch <= start for batch in batches) - 1, 0)
    first = batches[place]
    rate = attempt(micro_batch(first, effective))
    best = (first, rate) if rate is not None else None
    if best is not None:
        risen = _while_rising(batches[place + 1 :], best, effective, attempt)
        if risen != best:
            return risen
    return _while_rising(batches[:place][::-1], best, effective, attempt)


def _while_rising(
    batches: Sequence[int], best: tuple[int, float] | None, effective: int, attempt: Try
) -> tuple[int, float] | None:
    for batch in batches:
        rate = attempt(micro_batch(batch, effective))
        if rate is None and best is None:
            continue  # a smaller one may fit
        if rate is None or (best is not None and rate < LEAST_GAIN * best[1]):
            break
        best = batch, rate
    return best


def precision_settings(running: str, native: Sequence[str]) -> Iterator[Setting]:
    """Yield the precisions that the device has besides the one that runs."""
    for name in native:
        if name != running:
            yield Setting(f"precision={name}", {"precision.name": name})


def layout_setting(config: DictConfig) -> Setting:
    """Return the other memory layout."""
    other = not config.channels_last
    return Setting(f"channels_last={str(other).lower()}", {"channels_last": other})


def feeding_settings(config: DictConfig) -> Iterator[Setting]:
    """Yield the other place of augmentation, and a cache of decoded images where there is none."""
    places = {"cpu": "kornia-gpu", "kornia-gpu": "cpu"}
    if config.augmentation.name in places:
        other = places[config.augmentation.name]
        yield Setting(f"augmentation={other}", {"augmentation.name": other})
    if config.data.cache == "none":
        yield Setting("data.cache=disk", {"data.cache": "disk"})


def worker_settings(current: int, chosen: int) -> Iterator[Setting]:
    """Yield other numbers of data workers than the current one: by cores, half of that, none.

    Args:
        current: workers that run.
        chosen: workers that the machine's cores come to.
    """
    for workers in sorted({chosen, chosen // 2, 0} - {current}, reverse=True):
        yield Setting(f"loader.workers={workers}", {"loader.workers": workers})
