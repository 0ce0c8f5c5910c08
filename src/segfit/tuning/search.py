"""What benchmark=optimize tries, in its order, each change on top of those that were kept; and how it lets a model grow."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.assembly.data import workers_of
from segfit.assembly.task import TRAINED, assembly_of, planning_of, sample_bytes
from segfit.config.check import check
from segfit.config.tasks import schema_of
from segfit.data.images import largest_first
from segfit.data.source import Source
from segfit.engine.precision import native_precisions, resolve_precision
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.system.hardware import free_memory, resolve_device
from segfit.tuning import Bench
from segfit.tuning.change import Change, augmentation_of, changed
from segfit.tuning.climb import KEPT, NOT_FASTER, OUT_OF_MEMORY, Climb, Step
from segfit.tuning.max_batch import Trials

SECONDS = 4.0  # of a measurement
SURPASSED, TOO_SLOW = "another is faster still", "too slow"
LEAST_EFFECTIVE = 8  # a smaller batch trains neither fast nor, with batch norm, well
LEAST_GAIN = 1.02  # smaller gains are chance
# A measurement is killed after so many seconds, or so many times the first one's.
_PATIENCE, _PATIENCE_TIMES = 60.0, 4.0
# Share of the free memory; the rest is for files, data workers and other programs.
_HOST_SHARE = 0.5
GROWTH = 1.5  # of the arithmetic, a step
# Option that makes a model larger → the power of it that arithmetic grows with, and what it stays a multiple of: cards
# multiply eight channels of 16 bits at a time.
_KNOBS = {"model.base_channels": (2, 8), "model.num_blocks": (1, 1)}
SAMPLES = "samples"


class Search(Climb):
    """A climb to the fastest setting of benchmark=optimize; `deadline` by `time.monotonic`."""

    def __init__(
        self, config: DictConfig, bench: Bench, sources: Mapping[str, Source], deadline: float
    ) -> None:
        seconds = config.seconds or SECONDS
        super().__init__(config, bench, seconds, 12, least_gain=LEAST_GAIN, deadline=deadline)
        self.device, _ = resolve_device(config.device)
        samples, self.source = len(sources["train"]), sources["val"]  # of held-out samples
        self.held_out = largest_first(self.source)[:samples]
        composed = int(config.batch_size * config.accumulate)
        asked = config.benchmark.effective_batch
        self.effective = int(asked or max(composed, min(LEAST_EFFECTIVE, samples)))
        self.cap = min(samples, self.effective)  # no micro-batch is larger

    def run(self) -> int:
        """Keep whatever is faster; return the largest micro-batch, up to `cap`, that fits.

        Raise a SegFitError if the training does not run, or not even one sample fits.
        """
        config = self.start_config
        running = resolve_precision(config.precision.name, self.device)[0].name
        names = (name for name in native_precisions(self.device) if name != running)
        precisions = [{"precision": name} for name in names]
        composed = self.measure_start(Change("as composed"))
        if composed.speed is None and composed.verdict != OUT_OF_MEMORY:
            raise SegFitError([f"the composed training does not run: {composed.verdict}"])
        self.patience = max(_PATIENCE, _PATIENCE_TIMES * self.longest)
        if composed.speed is not None:
            self._try(precisions)
        fitting, checkpointing = self.fitting(self.cap), {"model.checkpointing": True}
        if fitting == 0 and config.model.get("checkpointing") is False:
            self.kept.update(checkpointing)
            fitting = self.fitting(self.cap)
        if fitting == 0:
            advice = schema_of(config.task.name).MEMORY_ADVICE
            raise SegFitError(f"no sample trains here. {advice} benchmark=plan says what helps.")
        self._choose_micro_batch(fitting)
        if composed.speed is None:
            self._try(precisions)
        self._try([{"channels_last": not config.channels_last}])
        # How many workers pay depends on how samples come, so they are tried before and after.
        self._try(self._other_workers())
        place = augmentation_of(config)
        other = "cpu" if place == "kornia-gpu" else "kornia-gpu"
        feeding = [{"augmentation": other}] if place != "none" else []
        feeding += [{"data.cache": "disk"}] if config.data.cache == "none" else []
        if self._try(feeding):
            self._try(self._other_workers())
        if fitting < self.cap and self.config().model.get("checkpointing") is False:
            # Memory was the limit: recompute activations for a larger micro-batch.
            most = self.fitting(self.cap, checkpointing)
            batch = max(micro_batches(self.effective, most), default=0)
            if batch > self.config().batch_size:
                self.step(named({**checkpointing, **micro_batch(batch, self.effective).options}))
        wanted = config.benchmark.compile
        if not config.compile and (self.device.type == "cuda" if wanted is None else wanted):
            self._try([{"compile": True}])
        return fitting

    def _try(self, changes: Iterable[Mapping[str, Any]]) -> bool:
        """Keep each change that is faster, but for those that change nothing here; return whether one was."""
        idle = planning_of(self.start_config).feeding(self.config()).idle
        found = [self.step(named(one)) for one in changes if not {*one} & {*idle}]
        return any(found)

    def fitting(self, cap: int, options: Mapping[str, Any] | None = None) -> int:
        """Return the largest micro-batch up to `cap` that fits with what is kept and `options`, 0 if none does.

        On the CPU a forecast that needs less than half of the free memory is enough; else max_batch's trials decide.
        """
        config = changed(self.config(), options or {})
        config.accumulate = min(self.effective, 2)  # gradients stay alive between micro-batches
        if config.benchmark.budget_gb is None and self.device.type == "cpu":
            config.benchmark.budget_gb = _HOST_SHARE * free_memory() / GIB
        end = time.monotonic() + self.left() / 2

        def progress(what: str, done: int, total: int) -> None:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError
            config.benchmark.timeout_s = max(left, 1.0)
            self.bench.progress(what, done, total)

        trials = Trials(config, replace(self.bench, progress=progress), self.held_out)
        try:
            if self.left() <= 0:
                raise TimeoutError
            planned = trials.start(cap)
            if self.device.type == "cpu" and planned == cap:
                return cap
            return trials.largest(start=planned, cap=cap)
        except TimeoutError:  # the search ends with what it has found
            composed = min(int(config.batch_size), cap) if self.best is not None else 0
            return max((one.batch_size for one in trials.tried if one.fits), default=composed)

    def _choose_micro_batch(self, fitting: int) -> None:
        config, effective = self.start_config, self.effective
        composed, before = self.best, len(self.steps)
        batches = micro_batches(effective, fitting)
        found = best_micro_batch(batches, int(config.batch_size), effective, self.attempt)
        if found is None and composed is None:
            raise SegFitError(
                "no batch could be trained in the time given: raise benchmark.budget_minutes, or try "
                "benchmark=max_batch."
            )
        if found is None:
            return
        batch, rate = found
        asked = config.benchmark.effective_batch is not None
        same = config.batch_size * config.accumulate == effective
        # Learning from more samples an update has to be worth it, unless it was asked for.
        if asked or same or composed is None or rate > composed:
            self.keep(micro_batch(batch, effective), rate)
            for step in self.steps[before:]:
                if step.verdict == NOT_FASTER and (step.rate or 0) > (composed or math.inf):
                    step.verdict = SURPASSED

    def _other_workers(self) -> list[dict[str, int]]:
        """Return other numbers of data workers than the current one: by cores, half of that, none."""
        now = self.config()
        current = workers_of(now, self.device, cached=True)
        now.loader.workers = None
        chosen = workers_of(now, self.device)
        others = sorted({chosen, chosen // 2, 0} - {current}, reverse=True)
        return [{"loader.workers": workers} for workers in others]

    def grow(self, floor: float) -> list[Step]:
        """Keep ever larger channels, blocks and samples, as long as they fit and train at `floor` samples per second.

        They grow in turn, each step by about half of the arithmetic: width, depth and resolution pay most together (Tan
        and Le, arXiv 1905.11946). What was too large once is not tried again.

        Return the steps that were kept.
        """
        before, knobs = len(self.steps), [*_KNOBS, SAMPLES]
        while knobs:
            knobs = [knob for knob in knobs if self._grown(knob, floor)]
        return [step for step in self.steps[before:] if step.verdict == KEPT]

    def _grown(self, knob: str, floor: float) -> bool:
        now = self.config()
        options = self.larger(now, knob)
        if not options:
            return False
        try:
            then = changed(now, options)
            check(then)
            if knob == SAMPLES:  # some pictures may be smaller than a patch that others hold
                assembly = assembly_of(then)
                assembly.check_sources(then, assembly.make_sources(then), TRAINED)
            most, refused = self.fitting(int(now.batch_size), options), OUT_OF_MEMORY
        except SegFitError as error:  # larger than its limit, or than the data
            most, refused = 0, " ".join(error.problems)
        if most == 0:
            self.steps.append(Step(named(options), refused))
            return False
        if most < now.batch_size:
            effective = int(now.batch_size * now.accumulate)
            options |= micro_batch(max(micro_batches(effective, most)), effective).options
        rate = self.attempt(named(options))
        if rate is not None and rate >= floor:
            self.keep(named(options), rate)
            return True
        if rate is not None:
            self.steps[-1].verdict = TOO_SLOW
        return False

    def larger(self, config: DictConfig, knob: str) -> dict[str, Any]:
        """Return options that are larger than a config's by a step of a knob; empty if there are none."""
        if knob == SAMPLES:
            bigger = schema_of(config.task.name).smaller_samples(config, GROWTH)
            options, _ = next(bigger, ({}, ""))
            now, then = map(sample_bytes, (config, changed(config, options)))
            # Nothing more is to be seen in a sample than the data has.
            if now < then <= sum(array.nbytes for array in self.source.read(self.held_out[0])):
                return options
            return {}
        power, multiple = _KNOBS[knob]
        value = OmegaConf.select(config, knob)
        if value is None:  # not every model has it
            return {}
        return {knob: math.ceil(value * GROWTH ** (1 / power) / multiple) * multiple}


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
    """Return the micro-batch at which samples per second stop rising, and that speed; None if none can be trained.

    `start`, or the nearest smaller one of the ascending `batches`, is tried first; from there larger ones while they are
    faster, and if none was, smaller ones while they are. `attempt` returns samples per second with a change, or None.
    """
    place = max(sum(batch <= start for batch in batches) - 1, 0)
    best: tuple[int, float] | None = None
    for way in (batches[place:], batches[:place][::-1]):
        if best is not None and best[0] > batches[place]:
            break
        for batch in way:
            rate = attempt(micro_batch(batch, effective))
            if rate is None and best is None and batch < batches[place]:
                continue  # a smaller one may fit
            if rate is None or (best is not None and rate < LEAST_GAIN * best[1]):
                break
            best = batch, rate
    return best


def named(options: Mapping[str, Any]) -> Change:
    """Return the change of options, named as it is typed."""
    return Change(Change("", options).typed, options)
