"""From what was recorded of a training to what holds it up, and the one change that helps most: arithmetic only.

The model of an update's time, by which every change is predicted:

- the host takes `host` seconds beside waiting for data, the device `resident` for the arithmetic of a batch that it has
  already, the data side `loader` to make the samples of one update;
- on the CPU they are one after the other without workers (host + loader), else side by side (the longer of them);
- on CUDA the device works beside the host too: the longest of resident, host (+ loader without workers), loader;
- workers that are started anew every epoch add what that takes, spread over the epoch's updates.

A change scales or removes one of the terms. Gains are in samples per second.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from segfit.tuning.change import Change
from segfit.tuning.facts import RARELY, Facts, Resident

WORTH = 1.05  # smaller gains are noise
_TIE = 1.03  # of two changes that are as good, the first in the order of `changes` is named
_PRICE = 1.25  # a change that also changes what is learned has to gain so much more than one that does not
_MOST_WORKERS = 16
_COMPETING = "workers that take the cores from the arithmetic"


@dataclass(frozen=True)
class Prediction:
    """A change and what it promises.

    Args:
        change: named by the bottleneck that it removes.
        gain: samples per second, new / old.
    """

    change: Change
    gain: float

    @property
    def worth(self) -> float:
        """The gain, as far as it comes without a price."""
        return self.gain / _PRICE if self.change.remark else self.gain


@dataclass(frozen=True)
class Verdict:
    """What holds a training up.

    Args:
        bottleneck: its name.
        best: the change that helps most; None where nothing that was tried helps.
        predictions: for all changes that were considered, best first.
    """

    bottleneck: str
    best: Prediction | None
    predictions: Sequence[Prediction]


def verdict(facts: Facts) -> Verdict:
    """Return what holds the training up, by the change that promises most."""
    found = list(predictions(facts))
    ranked = sorted(found, key=lambda one: -one.worth)
    if not ranked or ranked[0].gain < WORTH:
        return Verdict(_without_a_cure(facts), None, ranked)
    best = next(one for one in found if one.worth * _TIE >= ranked[0].worth)
    # What other changes would do beside workers that disturb the arithmetic is beyond this model: them first.
    disturbing = (one for one in found if one.change.name == _COMPETING)
    best = next((one for one in disturbing if one.gain >= WORTH), best)
    ranked.remove(best)
    return Verdict(best.change.name, best, [best, *ranked])


def predictions(facts: Facts) -> Iterator[Prediction]:
    """Yield a prediction for every change that applies, those without a price first."""
    yield from _feeding(facts)
    yield from _reading(facts)
    for one in facts.tried:
        yield _tried(facts, one)


def seconds(facts: Facts, *, host: float, resident: float, loader: float, workers: int) -> float:
    """Return the time of an update by the model, but for restarts of workers."""
    if workers == 0:
        host, loader = host + loader, 0.0
    return max(host, loader, resident) if facts.cuda else max(host, loader)


def _predicted(
    facts: Facts,
    bottleneck: str,
    options: Mapping[str, Any],
    *,
    restart: float | None = None,
    remark: str = "",
    **terms: float | int,
) -> Prediction:
    """Return the gain of a change by the model; `terms` replaces some of what holds now."""
    now: dict[str, float | int] = {
        "host": facts.host,
        "resident": facts.resident,
        "loader": facts.loader,
        "workers": facts.workers,
    }
    new = seconds(facts, **{**now, **terms})  # type: ignore[arg-type]
    new += facts.restart if restart is None else restart
    gain = facts.update / new if new > 0 else math.inf
    return Prediction(Change(bottleneck, options, remark), gain)


def _feeding(facts: Facts) -> Iterator[Prediction]:
    """How batches come to the device, and how often the host looks at it."""
    if facts.workers > 0 and not facts.persistent:
        kept = {"loader.persistent": True}
        yield _predicted(facts, "workers restarted every epoch", kept, restart=facts.refill)
    without_copy = facts.host - facts.phase("copy")
    if facts.cuda and not facts.pin_memory:
        options: dict[str, Any] = {"loader.pin_memory": True}
        yield _predicted(facts, "no pinned memory", options, host=without_copy)
    if facts.cuda and facts.pin_memory and not facts.non_blocking:
        options = {"loader.non_blocking": True}
        yield _predicted(facts, "blocking copies", options, host=without_copy)
    if facts.log_every < RARELY:
        spared = facts.phase("logging") * (1 - facts.log_every / RARELY)
        options = {"report.log_every": RARELY}
        name = "the host reads the device at every update"
        if facts.log_every > 1:
            name = f"the host reads the device every {facts.log_every} updates"
        yield _predicted(facts, name, options, host=facts.host - spared)


def _reading(facts: Facts) -> Iterator[Prediction]:
    """How samples are made, and by how many."""
    costs, cached = facts.costs, facts.cached
    if not facts.cuda and facts.workers > 0 and facts.threads >= facts.cores:
        yield _without_workers(facts)
    slow_disk = costs.wait > max(costs.decode, costs.fit, costs.augment)
    cache: list[Prediction] = []
    if cached is not None and cached.total < costs.total:
        name = "slow disk" if costs.wait > costs.decode else "image decoding"
        share = cached.total / costs.total
        options = {"data.cache": facts.cache}
        cache = [_predicted(facts, name, options, loader=share * facts.loader)]
    # More processes waiting for a disk that is slow may only make it slower: rather read each file once.
    more = list(_more_workers(facts))
    yield from [*cache, *more] if slow_disk else [*more, *cache]


def _without_workers(facts: Facts) -> Prediction:
    """Return what comes of reading in the main process, where workers only take cores from the arithmetic."""
    return _predicted(
        facts,
        _COMPETING,
        {"loader.workers": 0},
        restart=0.0,
        host=facts.host - facts.disturbed,
        loader=facts.samples * facts.costs.total,
        workers=0,
    )


def _more_workers(facts: Facts) -> Iterator[Prediction]:
    """Yield the smallest number of workers that promises as much as any larger one, if it is more than now."""
    if facts.costs.total <= 0:
        return
    found = []
    for workers in range(facts.workers + 1, _MOST_WORKERS + 1):
        host, loader = _with_workers(facts, workers)
        options = {"loader.workers": workers}
        found.append(
            _predicted(facts, "too few workers", options, host=host, loader=loader, workers=workers)
        )
    if found:
        most = max(one.gain for one in found)
        yield next(one for one in found if one.gain * _TIE >= most)


def _with_workers(facts: Facts, workers: int) -> tuple[float, float]:
    """Return (host, loader) with so many workers: waiting is shared by all, arithmetic by the cores there are."""
    waiting = facts.costs.wait / facts.costs.total
    spare = facts.cores if facts.cuda else facts.cores - facts.threads

    def pace(workers: int) -> float:
        return waiting / workers + (1 - waiting) / min(workers, max(spare, 1))

    whole = facts.loader / pace(max(facts.workers, 1))  # seconds of one process an update
    # Where every core works for the model already, the model waits for what workers compute.
    taken = (1 - waiting) * whole if spare < 1 and facts.workers == 0 else 0.0
    return facts.host + taken, whole * pace(workers)


def _tried(facts: Facts, tried: Resident) -> Prediction:
    """Return what a setting of the arithmetic promises by its measured time."""
    change = tried.change
    times = tried.samples / facts.samples
    host = facts.host + facts.disturbed * (times - 1)
    if facts.in_step:
        host += tried.seconds - facts.resident
    loader = times * facts.loader
    if change.options.get("augmentation") == "kornia-gpu" and facts.costs.total > 0:
        loader *= 1 - facts.costs.augment / facts.costs.total
    terms = {"host": max(host, 0.0), "resident": tried.seconds, "loader": loader}
    one = _predicted(facts, change.name, change.options, remark=change.remark, **terms)
    return replace(one, gain=times * one.gain)


def _without_a_cure(facts: Facts) -> str:
    waiting = facts.phase("data") / facts.update if facts.update else 0.0
    if waiting > 0.3:
        return "waiting for data"
    return "the model's own arithmetic"
