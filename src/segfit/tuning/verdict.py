"""From what was recorded of a training to what holds it up, and the one change that helps most: arithmetic only.

docs/diagnose.md says how an update's time is modelled. A change scales or removes one of the model's terms.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from segfit.tuning.change import Change

ARITHMETIC = ("augmentation", "forward", "backward", "optimizer")  # phases
RARELY = 20  # updates between two readings of the device that cost nothing
WORTH = 1.05  # smaller gains are noise
_TIE = 1.03  # of two changes that are as good, the first in the order of `predictions` is named
_PRICE = 1.25  # a change with a remark has to gain so much more than one without
_MOST_WORKERS = 16
_COMPETING = "workers that take the cores from the arithmetic"


@dataclass(frozen=True)
class Costs:
    """Seconds that one process takes for one sample."""

    wait: float = 0.0  # of reading, without the processor: the disk, or the network
    decode: float = 0.0  # of reading, on the processor
    fit: float = 0.0  # to bring it to image_size
    augment: float = 0.0  # in the worker

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


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What was recorded. Times are seconds an update."""

    cuda: bool
    samples: int  # of an update
    update: float  # wall-clock, without validation and checkpoints
    phases: Mapping[str, float]  # on the host's clock: data, copy, `ARITHMETIC`, logging
    resident: float = 0.0  # of the arithmetic alone, with a batch that lies on the device
    # That the host takes to launch the arithmetic on CUDA, measured with samples that cost the device nothing. Phases do not
    # show it: a queue of about a thousand kernels is full behind a busy device, and launching waits for it.
    launching: float = 0.0
    costs: Costs
    workers: int
    cores: int  # that this process may use
    threads: int  # of the arithmetic on the CPU
    restart: float = 0.0  # that the loop waits at the turns of epochs, for workers to start and end
    refill: float = 0.0  # as much of it as is left if workers are kept: they make the first batch
    cached: Costs | None = None  # if decoded images were kept; None: they are already
    pin_memory: bool = True
    non_blocking: bool = True
    persistent: bool = True
    log_every: int = 20  # updates between two readings of the device
    cache: str = "ram"  # where decoded images would be kept
    tried: Sequence[Resident] = ()  # other settings of the arithmetic
    idle: Sequence[str] = ()  # options that change nothing for the task

    def phase(self, name: str) -> float:
        """Seconds of a phase; 0 if it never came."""
        return self.phases.get(name, 0.0)

    @property
    def host(self) -> float:
        """What the host does beside waiting: for data and, on CUDA, for room in the queue and for the device to be read."""
        waiting = self.phase("data")
        if self.cuda and self.log_every >= RARELY:
            waiting += self.phase("logging")
        if not self.in_step:
            waiting += max(self.arithmetic - self.launching, 0.0)
        return max(self.update - waiting, 0.0)

    @property
    def arithmetic(self) -> float:
        """What the arithmetic takes on the host's clock."""
        return sum(self.phase(name) for name in ARITHMETIC)

    @property
    def in_step(self) -> bool:
        """Whether host and device work one after the other: on the CPU, or where the host waits at every update."""
        return not self.cuda or self.log_every < RARELY or not self.non_blocking

    @property
    def disturbed(self) -> float:
        """What workers take from the arithmetic, which has the same cores: on the CPU, where no core is spare."""
        if self.cuda or self.workers == 0 or self.threads < self.cores:
            return 0.0
        return max(self.arithmetic - self.resident, 0.0)

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
        """The gain, less the price of what is remarked on it."""
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
    helping = [one for one in found if one.gain >= WORTH]
    if not helping:
        waits = facts.phase("data") > 0.3 * facts.update
        name = "waiting for data" if waits else "the model's own arithmetic"
        return Verdict(name, None, ranked)
    most = max(one.worth for one in helping)
    best = next(one for one in helping if one.worth * _TIE >= most)
    # What other changes would do beside workers that disturb the arithmetic is beyond this model: them first.
    best = next((one for one in helping if one.change.name == _COMPETING), best)
    ranked.remove(best)
    return Verdict(best.change.name, best, [best, *ranked])


def predictions(facts: Facts) -> Iterator[Prediction]:
    """Yield a prediction for every change that applies, those without a price first."""
    tried = (_tried(facts, one) for one in facts.tried)
    for one in (*_feeding(facts), *_reading(facts), *tried):
        if not {*facts.idle} & one.change.options.keys():
            yield one


def predicted(facts: Facts, change: Change, **terms: float) -> Prediction:
    """Return the gain of a change by the model of an update's time; `terms` replaces some of what holds now."""
    names = ("host", "resident", "loader", "workers", "restart")
    host, resident, loader, workers, restart = (
        terms.get(name, getattr(facts, name)) for name in names
    )
    if workers == 0:
        host, loader = host + loader, 0.0
    new = restart + (max(host, loader, resident) if facts.cuda else max(host, loader))
    return Prediction(change, facts.update / new if new > 0 else math.inf)


def _feeding(facts: Facts) -> Iterator[Prediction]:
    """How batches come to the device, and how often the host looks at it."""
    if facts.workers > 0 and not facts.persistent:
        kept = Change("workers restarted every epoch", {"loader.persistent": True})
        yield predicted(facts, kept, restart=facts.refill)
    if facts.cuda and not (facts.pin_memory and facts.non_blocking):
        change = Change("blocking copies", {"loader.non_blocking": True})
        if not facts.pin_memory:
            change = Change("no pinned memory", {"loader.pin_memory": True})
        yield predicted(facts, change, host=facts.host - facts.phase("copy"))
    if facts.log_every < RARELY:
        spared = facts.phase("logging") * (1 - facts.log_every / RARELY)
        often = "at every update" if facts.log_every == 1 else f"every {facts.log_every} updates"
        change = Change(f"the host reads the device {often}", {"report.log_every": RARELY})
        yield predicted(facts, change, host=facts.host - spared)


def _reading(facts: Facts) -> Iterator[Prediction]:
    """How samples are made, and by how many."""
    costs, cached = facts.costs, facts.cached
    if not facts.cuda and facts.workers > 0 and facts.threads >= facts.cores:
        terms = {"host": facts.host - facts.disturbed, "loader": facts.samples * costs.total}
        alone = Change(_COMPETING, {"loader.workers": 0})
        yield predicted(facts, alone, restart=0.0, workers=0, **terms)
    cache: list[Prediction] = []
    if cached is not None and cached.total < costs.total:
        name = "slow disk" if costs.wait > costs.decode else "image decoding"
        loader = cached.total / costs.total * facts.loader
        cache = [predicted(facts, Change(name, {"data.cache": facts.cache}), loader=loader)]
    # More processes waiting for a disk that is slow may only make it slower: rather read each file once.
    slow_disk = costs.wait > max(costs.decode, costs.fit, costs.augment)
    more = list(_more_workers(facts, "if the disk can serve so many at once" if slow_disk else ""))
    yield from [*cache, *more] if slow_disk else [*more, *cache]


def _more_workers(facts: Facts, remark: str) -> Iterator[Prediction]:
    """Yield the smallest number of workers that promises as much as any larger one, if it is more than now.

    Waiting is shared by all of them, arithmetic by the cores there are.
    """
    if facts.costs.total <= 0:
        return
    waiting = facts.costs.wait / facts.costs.total
    spare = facts.cores - (1 if facts.cuda else facts.threads)  # on CUDA one launches kernels

    def pace(workers: int) -> float:
        return waiting / workers + (1 - waiting) / min(workers, max(spare, 1))

    whole = facts.loader / pace(max(facts.workers, 1))  # seconds of one process an update
    # Where every core works for the model already, the model waits for what workers compute.
    taken = (1 - waiting) * whole if spare < 1 and facts.workers == 0 else 0.0
    found = []
    for workers in range(facts.workers + 1, _MOST_WORKERS + 1):
        terms = {"host": facts.host + taken, "loader": whole * pace(workers), "workers": workers}
        change = Change("too few workers", {"loader.workers": workers}, remark)
        found.append(predicted(facts, change, **terms))
    if found:
        most = max(one.gain for one in found)
        yield next(one for one in found if one.gain * _TIE >= most)


def _tried(facts: Facts, tried: Resident) -> Prediction:
    """Return what a setting of the arithmetic promises by its measured time."""
    times = tried.samples / facts.samples
    host = facts.host + facts.disturbed * (times - 1)
    if facts.in_step:
        host += tried.seconds - facts.resident
    else:  # its update cannot take the host longer to launch than it took in all
        host -= max(min(facts.arithmetic, facts.launching) - tried.seconds, 0.0)
    loader = times * facts.loader
    if tried.change.options.get("augmentation") == "kornia-gpu" and facts.costs.total > 0:
        loader *= 1 - facts.costs.augment / facts.costs.total
    terms = {"host": max(host, 0.0), "resident": tried.seconds, "loader": loader}
    one = predicted(facts, tried.change, **terms)
    return replace(one, gain=times * one.gain)
