"""From what was recorded of a training to what holds it up, and the one change that helps most: arithmetic only.

The model of an update's time, by which every change is predicted:

- the host takes `host` seconds beside waiting for data, the device `resident` for the arithmetic of a batch that it has
  already, the data side `loader` to make the images of one update;
- on the CPU they are one after the other without workers (host + loader), else side by side (the longer of them);
- on CUDA the device works beside the host too: the longest of resident, host (+ loader without workers), loader;
- workers that are started anew every epoch add what that takes, spread over the epoch's updates.

A change scales or removes one of the terms. Gains are in images per second.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from segfit.tuning.facts import RARELY, Facts, Trial

WORTH = 1.05  # smaller gains are noise
_TIE = 1.03  # of two changes that are as good, the first in the order of `changes` is named
_PRICE = 1.25  # a change that also changes what is learned has to gain so much more than one that does not
_MOST_WORKERS = 16
_COMPETING = "workers that take the cores from the arithmetic"


@dataclass(frozen=True)
class Change:
    """A change and what it promises.

    Args:
        bottleneck: what it cures.
        change: option → value, as they are typed.
        gain: images per second, new / old.
        remark: what else it changes; empty: nothing.
    """

    bottleneck: str
    change: Mapping[str, str]
    gain: float
    remark: str = ""

    @property
    def overrides(self) -> str:
        """As it is typed."""
        return typed(self.change)

    @property
    def worth(self) -> float:
        """The gain, as far as it comes without a price."""
        return self.gain / _PRICE if self.remark else self.gain


@dataclass(frozen=True)
class Verdict:
    """What holds a training up.

    Args:
        bottleneck: its name.
        best: the change that helps most; None where nothing that was tried helps.
        changes: all that were considered, best first.
    """

    bottleneck: str
    best: Change | None
    changes: Sequence[Change]


def typed(change: Mapping[str, str]) -> str:
    """Return options as they are typed."""
    return " ".join(f"{key}={value}" for key, value in change.items())


def verdict(facts: Facts) -> Verdict:
    """Return what holds the training up, by the change that promises most."""
    found = list(changes(facts))
    ranked = sorted(found, key=lambda change: -change.worth)
    if not ranked or ranked[0].gain < WORTH:
        return Verdict(_without_a_cure(facts), None, ranked)
    best = next(change for change in found if change.worth * _TIE >= ranked[0].worth)
    # What other changes would do beside workers that disturb the arithmetic is beyond this model: them first.
    disturbing = (change for change in found if change.bottleneck == _COMPETING)
    best = next((change for change in disturbing if change.gain >= WORTH), best)
    ranked.remove(best)
    return Verdict(best.bottleneck, best, [best, *ranked])


def changes(facts: Facts) -> Iterator[Change]:
    """Yield every change that applies, those without a price first."""
    yield from _feeding(facts)
    yield from _reading(facts)
    for trial in facts.trials:
        yield _tried(facts, trial)


def seconds(facts: Facts, *, host: float, resident: float, loader: float, workers: int) -> float:
    """Return the time of an update by the model, but for restarts of workers."""
    if workers == 0:
        host, loader = host + loader, 0.0
    return max(host, loader, resident) if facts.cuda else max(host, loader)


def _predicted(
    facts: Facts,
    bottleneck: str,
    change: Mapping[str, str],
    *,
    restart: float | None = None,
    remark: str = "",
    **terms: float | int,
) -> Change:
    """Return a change with its gain by the model; `terms` replaces some of what holds now."""
    now: dict[str, float | int] = {
        "host": facts.host,
        "resident": facts.resident,
        "loader": facts.loader,
        "workers": facts.workers,
    }
    new = seconds(facts, **{**now, **terms})  # type: ignore[arg-type]
    new += facts.restart if restart is None else restart
    return Change(bottleneck, change, facts.update / new if new > 0 else math.inf, remark)


def _feeding(facts: Facts) -> Iterator[Change]:
    """How batches come to the device, and how often the host looks at it."""
    if facts.workers > 0 and not facts.persistent:
        kept = {"loader.persistent": "true"}
        yield _predicted(facts, "workers restarted every epoch", kept, restart=facts.refill)
    without_copy = facts.host - facts.phase("copy")
    if facts.cuda and not facts.pin_memory:
        change = {"loader.pin_memory": "true"}
        yield _predicted(facts, "no pinned memory", change, host=without_copy)
    if facts.cuda and facts.pin_memory and not facts.non_blocking:
        change = {"loader.non_blocking": "true"}
        yield _predicted(facts, "blocking copies", change, host=without_copy)
    if facts.log_every < RARELY:
        spared = facts.phase("logging") * (1 - facts.log_every / RARELY)
        change = {"report.log_every": str(RARELY)}
        name = "the host reads the device at every update"
        if facts.log_every > 1:
            name = f"the host reads the device every {facts.log_every} updates"
        yield _predicted(facts, name, change, host=facts.host - spared)


def _reading(facts: Facts) -> Iterator[Change]:
    """How samples are made, and by how many."""
    costs, cached = facts.costs, facts.cached
    if not facts.cuda and facts.workers > 0 and facts.threads >= facts.cores:
        yield _without_workers(facts)
    slow_disk = costs.wait > max(costs.decode, costs.fit, costs.augment)
    cache: list[Change] = []
    if cached is not None and cached.total < costs.total:
        name = "slow disk" if costs.wait > costs.decode else "image decoding"
        share = cached.total / costs.total
        change = {"data.cache": facts.cache}
        cache = [_predicted(facts, name, change, loader=share * facts.loader)]
    # More processes waiting for a disk that is slow may only make it slower: rather read each file once.
    more = list(_more_workers(facts))
    yield from [*cache, *more] if slow_disk else [*more, *cache]


def _without_workers(facts: Facts) -> Change:
    """Return what comes of reading in the main process, where workers only take cores from the arithmetic."""
    return _predicted(
        facts,
        _COMPETING,
        {"loader.workers": "0"},
        restart=0.0,
        host=facts.host - facts.disturbed,
        loader=facts.images * facts.costs.total,
        workers=0,
    )


def _more_workers(facts: Facts) -> Iterator[Change]:
    """Yield the smallest number of workers that promises as much as any larger one, if it is more than now."""
    if facts.costs.total <= 0:
        return
    options = []
    for workers in range(facts.workers + 1, _MOST_WORKERS + 1):
        host, loader = _with_workers(facts, workers)
        change = {"loader.workers": str(workers)}
        options.append(
            _predicted(facts, "too few workers", change, host=host, loader=loader, workers=workers)
        )
    if options:
        most = max(change.gain for change in options)
        yield next(change for change in options if change.gain * _TIE >= most)


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


def _tried(facts: Facts, trial: Trial) -> Change:
    """Return what a setting of the arithmetic promises by its measured time."""
    times = trial.images / facts.images
    host = facts.host + facts.disturbed * (times - 1)
    if facts.in_step:
        host += trial.resident - facts.resident
    loader = times * facts.loader
    if trial.change.get("augmentation") == "kornia-gpu" and facts.costs.total > 0:
        loader *= 1 - facts.costs.augment / facts.costs.total
    one = _predicted(
        facts,
        trial.bottleneck,
        trial.change,
        host=max(host, 0.0),
        resident=trial.resident,
        loader=loader,
        remark=trial.remark,
    )
    return replace(one, gain=times * one.gain)


def _without_a_cure(facts: Facts) -> str:
    waiting = facts.phase("data") / facts.update if facts.update else 0.0
    if waiting > 0.3:
        return "waiting for data"
    return "the model's own arithmetic"
