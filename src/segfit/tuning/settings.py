"""Which changes benchmark=optimize tries. Nothing here measures."""

from collections.abc import Callable, Iterator, Sequence

from omegaconf import DictConfig

from segfit.tuning.change import Change, augmentation_of

LEAST_EFFECTIVE = 8  # a smaller batch trains neither fast nor, with batch norm, well
LEAST_GAIN = 1.02  # smaller gains are chance


def effective_batch(config: DictConfig, samples: int) -> int:
    """Return the effective batch of the result: benchmark.effective_batch, else the composed one, at least 8.

    Args:
        config: of benchmark.py.
        samples: to train on.
    """
    if config.benchmark.effective_batch is not None:
        return int(config.benchmark.effective_batch)
    composed = int(config.batch_size * config.accumulate)
    return max(composed, min(LEAST_EFFECTIVE, samples))


def micro_batches(effective: int, most: int) -> list[int]:
    """Return micro-batches up to `most` that divide the effective batch, each at least 1.5 times the one before."""
    chosen: list[int] = []
    for batch in range(1, min(effective, most) + 1):
        if effective % batch == 0 and (not chosen or batch >= 1.5 * chosen[-1]):
            chosen.append(batch)
    return chosen


def micro_batch(batch: int, effective: int) -> Change:
    """Return the change to a micro-batch; accumulation keeps the effective batch."""
    options = {"batch_size": batch, "accumulate": effective // batch}
    return Change(f"batch_size={batch} × {effective // batch}", options)


def best_micro_batch(
    batches: Sequence[int], start: int, effective: int, attempt: Callable[[Change], float | None]
) -> tuple[int, float] | None:
    """Return the micro-batch at which samples per second stop rising, and them; None if none can be trained.

    `start`, or the nearest that is smaller, is tried first; from there larger ones while they are faster, and if none
    was, smaller ones while they are.

    Args:
        batches: ascending.
        start: of the composed recipe.
        effective: batch, a multiple of each.
        attempt: returns samples per second with a change, or None if it cannot be trained.
    """
    place = max(sum(batch <= start for batch in batches) - 1, 0)

    def while_rising(
        batches: Sequence[int], best: tuple[int, float] | None
    ) -> tuple[int, float] | None:
        for batch in batches:
            rate = attempt(micro_batch(batch, effective))
            if rate is None and best is None:
                continue  # a smaller one may fit
            if rate is None or (best is not None and rate < LEAST_GAIN * best[1]):
                break
            best = batch, rate
        return best

    best = while_rising([batches[place]], None)
    risen = while_rising(batches[place + 1 :], best) if best is not None else None
    return risen if risen != best else while_rising(batches[:place][::-1], best)


def feeding_changes(config: DictConfig) -> Iterator[Change]:
    """Yield the other place of augmentation, and a cache of decoded images if there is none."""
    places = {"cpu": "kornia-gpu", "kornia-gpu": "cpu"}
    place = augmentation_of(config)
    if place in places:
        yield set_option("augmentation", places[place])
    if config.data.cache == "none":
        yield set_option("data.cache", "disk")


def worker_changes(current: int, chosen: int) -> list[Change]:
    """Return other numbers of data workers than the current one: by cores, half of that, none.

    Args:
        current: workers that run.
        chosen: workers that the machine's cores come to.
    """
    others = sorted({chosen, chosen // 2, 0} - {current}, reverse=True)
    return [set_option("loader.workers", workers) for workers in others]


def set_option(key: str, value: str | int) -> Change:
    """Return the change of one option, named as it is typed."""
    change = Change("", {key: value})
    return Change(change.typed, change.options)
