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

ARITHMETIC = ("augmentation", "forward", "backward", "optimizer")  # phases
RARELY = 20  # updates between two readings of the device that cost nothing
WORTH = 1.05  # smaller gains are noise
_TIE = 1.03  # of two changes that are as good, the first in the order of `changes` is named
_PRICE = 1.25  # a change that also changes what is learned has to gain so much more than one that does not
_MOST_WORKERS = 16
_COMPETING = "workers that take the cores from the arithmetic"


@dataclass(frozen=True)
class Costs:
    """Seconds that one process takes for one sample.

    Args:
        wait: of reading, without the processor: the disk, or the network.
        decode: of reading, on the processor.
        fit: to bring it to image_size.
        augment: in the worker.
    """

    wait: float = 0.0
    decode: float = 0.0
    fit: float = 0.0
    augment: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.wait + self.decode + self.fit + self.augment


@dataclass(frozen=True)
class Resident:
    """Seconds and samples of an update on a resident batch with a change, named by the bottleneck that it removes."""

    change: Change
    seconds: float
    samples: int


@dataclass(frozen=True)
class Facts:
    """What was recorded. Times are seconds an update.

    Args:
        cuda: whether the device is a CUDA card.
        samples: of an update.
        update: wall-clock, without validation and checkpoints.
        phases: name → time on the host's clock: data, copy, augmentation, forward, backward, optimizer, logging.
        resident: of the arithmetic alone, with a batch that lies on the device.
        restart: that the loop waits for data at the turns of epochs, starting and ending workers included.
        refill: as much of it as would be left if workers were kept: they make the first batch first.
        costs: of a sample.
        cached: of a sample if decoded images were kept; None: they are already.
        workers: processes that read.
        cores: that this process may use.
        threads: of the arithmetic on the CPU.
        pin_memory: whether batches are page-locked.
        non_blocking: whether the host goes on while a batch is copied.
        persistent: whether workers are kept between epochs.
        log_every: updates between two readings of the device.
        cache: where decoded images would be kept: "ram" or "disk".
        tried: other settings of the arithmetic.
    """

    cuda: bool
    samples: int
    update: float
    phases: Mapping[str, float]
    resident: float
    costs: Costs
    workers: int
    cores: int
    threads: int
    restart: float = 0.0
    refill: float = 0.0
    cached: Costs | None = None
    pin_memory: bool = True
    non_blocking: bool = True
    persistent: bool = True
    log_every: int = 20
    cache: str = "ram"
    tried: Sequence[Resident] = ()

    def phase(self, name: str) -> float:
        """Seconds of a phase; 0 if it never came."""
        return self.phases.get(name, 0.0)

    @property
    def host(self) -> float:
        """What the host does beside waiting: for data and, on CUDA, for the device to be read."""
        waiting = self.phase("data")
        if self.cuda and self.log_every >= RARELY:
            waiting += self.phase("logging")
        return max(self.update - waiting, 0.0)

    @property
    def in_step(self) -> bool:
        """Whether host and device work one after the other: on the CPU, or where the host waits at every update."""
        return not self.cuda or self.log_every < RARELY or not self.non_blocking

    @property
    def disturbed(self) -> float:
        """What workers take from the arithmetic, which has the same cores: on the CPU, where no core is spare."""
        if self.cuda or self.workers == 0 or self.threads < self.cores:
            return 0.0
        return max(sum(self.phase(name) for name in ARITHMETIC) - self.resident, 0.0)

    @property
    def loader(self) -> float:
        """What the data side takes for the samples of an update."""
        waited = self.phase("data") - self.restart
        if self.workers == 0:
            return max(waited, 0.0)
        if waited > 0.1 * self.update:  # the loop waits, so the data side sets the pace
            return self.update - self.restart
        return min(self.samples * self.costs.total / self.workers, self.update - self.restart)


@dataclass(frozen=True)
class Prediction:
    """A change, named by the bottleneck that it removes, and its gain: samples per second, new / old."""

    change: Change
    gain: float

    @property
    def worth(self) -> float:
        """The gain, as far as it comes without a price."""
        return self.gain / _PRICE if self.change.remark else self.gain


@dataclass(frozen=True)
class Verdict:
    """What holds a training up: the best change (None: nothing helps) and all that were considered, best first."""

    bottleneck: str
    best: Prediction | None
    predictions: Sequence[Prediction]


def verdict(facts: Facts) -> Verdict:
    """Return what holds the training up, by the change that promises most."""
    found = list(predictions(facts))
    ranked = sorted(found, key=lambda one: -one.worth)
    if not ranked or ranked[0].gain < WORTH:
        waits = facts.phase("data") > 0.3 * facts.update
        name = "waiting for data" if waits else "the model's own arithmetic"
        return Verdict(name, None, ranked)
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
        yield _predicted(
            facts,
            _COMPETING,
            {"loader.workers": 0},
            restart=0.0,
            host=facts.host - facts.disturbed,
            loader=facts.samples * costs.total,
            workers=0,
        )
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
