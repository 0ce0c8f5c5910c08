"""benchmark=max_batch: the largest micro-batch that trains here, found by training with it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass
from functools import cache, partial

import psutil
import torch
from omegaconf import DictConfig

from segfit.assembly.task import TRAINED, assembly_of
from segfit.config.tasks import schema_of
from segfit.data.images import largest_first
from segfit.engine.findings import Findings, Table, columns
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.system.hardware import resolve_device
from segfit.tuning import Bench
from segfit.tuning.measure import trial_config
from segfit.tuning.memory.planner import CONTEXT, forecast_of
from segfit.tuning.trial import Outcome, run_trial

OUT_OF_MEMORY, OVER_BUDGET = "out of memory", "over the budget"
_COLUMNS = "batch_size | verdict | peak GiB:.3f | limit GiB:.3f | samples/s:.1f | trial s:.1f"
_GUESSES_IN_A_ROW = 3  # then a step whose gain is sure
_LEAP = 8  # a guess is followed no further than so many times what is known to fit
_SEARCH, _VERIFY = 1, 2  # rounds of training and validation in a trial


@dataclass(frozen=True)
class Tried:
    """A batch that was tried."""

    batch_size: int  # samples of a micro-batch
    fits: bool  # it may be used
    verdict: str  # "fits", or why not
    peak_gib: float | None = None  # of allocated bytes; None if the process crashed
    limit_gib: float | None = None  # what it had to stay below
    samples_per_second: float | None = None  # of training, on a batch that is there already
    seconds: float = 0.0  # that the trial took, its process's start included


def run(config: DictConfig, bench: Bench) -> Findings:
    """Return the largest batch that fits, and every trial that led to it."""
    sources = assembly_of(config).make_sources(config)
    for line in assembly_of(config).check_sources(config, sources, TRAINED).notices:
        bench.notice(line)
    cap = len(sources["train"])
    trials = Trials(config, bench, largest_first(sources["val"])[:cap])
    return _findings(config, trials, trials.largest(start=trials.start(cap), cap=cap), cap)


class Trials:
    """Tries batches in processes of their own and keeps what came of it; `held_out`: indices to validate on, the largest first."""

    def __init__(self, config: DictConfig, bench: Bench, held_out: list[int]) -> None:
        self.config, self.bench, self.held_out = config, bench, held_out
        self.options = config.benchmark
        self.tried: list[Tried] = []
        self.device, _ = resolve_device(config.device)
        self.budget_gb = self.options.budget_gb
        # Read once: each trial must have the same limit. On CUDA the child asks the driver, with its own context.
        if self.budget_gb is None and self.device.type == "cpu":
            self.budget_gb = psutil.virtual_memory().available / GIB

    def start(self, cap: int) -> int:
        """Return the batch to begin with: the forecast's answer, 0 if that is none; batch_size without a forecast."""
        working = partial(self.bench.progress, "recording a step without data", 0, 1)
        try:
            forecast = forecast_of(self.config, self.device.type, working=working)
        except Exception as error:  # a forecast only saves trials, which raise what is wrong
            self.bench.notice(f"no forecast, so the search starts at batch_size: {error}")
            return min(int(self.config.batch_size), cap)
        room = self.budget_gb * GIB if self.budget_gb is not None else math.inf
        if self.device.type == "cuda":
            card = torch.cuda.get_device_properties(self.device)
            room = min(room, card.total_memory - CONTEXT)
        return int(min(forecast.largest(room * (1 - self.options.margin)), cap))

    def largest(self, *, start: int, cap: int) -> int:
        """Return the largest batch up to `cap` that fits, in a second, longer trial too; 0 if none does."""
        fits = cache(lambda batch: self.tries(batch).fits)
        while cap > 0:
            answer = largest_that_fits(fits, start=max(start, 1), cap=cap, guess=self._guess)
            if answer == 0 or self.tries(answer, _VERIFY).fits:
                return answer
            cap = answer - 1
        return 0

    def tries(self, batch: int, rounds: int = _SEARCH) -> Tried:
        """Try a batch, in a process of its own; `rounds` of training and validation."""
        what = f"batch_size={batch}" + (", once more and longer" if rounds == _VERIFY else "")
        for _ in range(2):
            self.bench.progress(what, len(self.tried), max(8, len(self.tried) + 2))
            outcome = run_trial(
                trial_config(self.config, batch),
                job="segfit.tuning.measure:fits",
                timeout_s=self.options.timeout_s,
                budget_gb=self.budget_gb,
                margin=self.options.margin,
                rounds=rounds,
                seconds=self.config.seconds or 0.0,
                largest=self.held_out[:batch],
            )
            if outcome.reason == "input":
                lines = outcome.message.splitlines()
                raise SegFitError([f"batch_size={batch}: {line}" for line in lines])
            self.tried.append(self._judged(batch, outcome))
            if outcome.reason != "crash":  # perhaps by what others do on this machine: once more
                break
        return self.tried[-1]

    def _judged(self, batch: int, outcome: Outcome) -> Tried:
        if not outcome.ok:
            verdict = OUT_OF_MEMORY if outcome.reason == "oom" else outcome.message
            return Tried(batch, fits=False, verdict=verdict, seconds=outcome.seconds)
        values, speed = outcome.values, outcome.values["samples_per_second"]
        peak, limit = (values[f"{name}_bytes"] / GIB for name in ("peak", "limit"))
        verdict = "fits" if peak <= limit else OVER_BUDGET
        # A driver may lend host memory. Times of a CPU that others use too would decide by chance.
        if verdict == "fits" and values["device"] == "cuda":
            smaller = [one for one in self.tried if one.fits and one.batch_size < batch]
            fastest = max([speed, *(one.samples_per_second or 0.0 for one in smaller)])
            if speed * self.options.slowdown < fastest:
                times = f"{fastest / speed:.1f} times slower a sample than smaller batches"
                verdict = f"{times}: spilled into host memory"
        return Tried(batch, verdict == "fits", verdict, peak, limit, speed, outcome.seconds)

    def _guess(self) -> int | None:
        fitting = [item for item in self.tried if item.fits]
        peaks = {item.batch_size: item.peak_gib or 0.0 for item in fitting}
        return extrapolated(peaks, fitting[-1].limit_gib or 0.0) if fitting else None


def largest_that_fits(
    fits: Callable[[int], bool],
    *,
    start: int,
    cap: int,
    guess: Callable[[], int | None] = lambda: None,
) -> int:
    """Return the largest batch of 1 … `cap` that fits, 0 if none does; `fits` tries a batch, and is asked once for each.

    `start` is tried first, or a quarter of it, if that is more than an image, to know what is no longer faster than
    it; from there it doubles while it fits and bisects once something did not. What `guess` says that the trials so far
    make likely, or None, replaces doubling and bisecting, but never for long. The answer is that of an exhaustive scan
    wherever a smaller batch than one that fits does fit.
    """
    low, high = 0, cap + 1  # the largest that fits, the smallest that does not
    batch, guesses = start // 4 if start >= 8 else start, 0
    while high - low > 1:
        if fits(batch):
            low = batch
        else:
            high = batch
        guessed = guess() if guesses < _GUESSES_IN_A_ROW else None
        if low < start < high:
            batch = start
        elif guessed is not None and low > 0:
            batch, guesses = min(max(guessed, low + 1), high - 1, _LEAP * low), guesses + 1
        else:
            bisect = high <= cap or low == 0
            batch, guesses = max(1, (low + high) // 2) if bisect else min(2 * low, cap), 0
    return low


def extrapolated(peaks: Mapping[int, float], limit: float) -> int | None:
    """Return the batch whose peak meets `limit`, along the line through the two largest of `peaks`: batch → bytes.

    None with less than two, or where more images do not take more bytes.
    """
    if len(peaks) < 2:
        return None
    (less, less_bytes), (more, more_bytes) = sorted(peaks.items())[-2:]
    slope = (more_bytes - less_bytes) / (more - less)
    return int(more + (limit - more_bytes) // slope) if slope > 0 else None


def _findings(config: DictConfig, trials: Trials, answer: int, cap: int) -> Findings:
    tried = trials.tried
    best = next((one for one in tried[::-1] if one.fits and one.batch_size == answer), None)
    scalars = {"max_batch/batch_size": float(answer)}
    if best is not None:
        scalars["max_batch/peak_gib"] = best.peak_gib or 0.0
        scalars["max_batch/samples_per_second"] = best.samples_per_second or 0.0
    title = f"A process each, accumulate={config.accumulate}"
    rows = [[item.batch_size, *astuple(item)[2:]] for item in tried]
    emphasis = None if best is None else tried.index(best)
    return Findings(
        headline=_headline(config, tried, best, cap),
        tables=[Table("trials", title, columns(_COLUMNS), rows, emphasis)],
        values={
            "batch_size": answer,
            "override": f"batch_size={answer}" if answer else None,
            "accumulate": config.accumulate,
            "samples": cap,
            "trials": [asdict(item) for item in tried],
        },
        scalars=scalars,
    )


def _headline(config: DictConfig, tried: list[Tried], best: Tried | None, cap: int) -> str:
    if best is None:
        verdict = tried[-1].verdict
        if verdict not in (OUT_OF_MEMORY, OVER_BUDGET):
            return f"Not even one sample trains here: {verdict}"
        advice = schema_of(config.task.name).MEMORY_ADVICE
        return f"Not even one sample trains here ({verdict}). {advice}"
    batch, accumulate = best.batch_size, config.accumulate
    all_of_them = f"all {cap} training samples fit in one batch"
    why = all_of_them if batch == cap else "the largest that trains here"
    kept = f"{config.benchmark.margin:.0%} kept free"
    room = f"peak {best.peak_gib:.2f} of {best.limit_gib:.2f} GiB, {kept}"
    line = f"batch_size={batch}: {why} ({room}). Type: batch_size={batch}"
    if batch != config.batch_size:
        line += (
            f"\nThe effective batch is then {batch * accumulate}, no longer {config.batch_size * accumulate}: "
            f"benchmark=lr_find says which lr goes with it."
        )
    return line
