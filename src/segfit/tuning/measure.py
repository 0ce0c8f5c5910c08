"""How fast a training really runs, by the engine's own update and evaluation, and how much memory a piece of work takes."""

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import accumulate, chain, count, islice, pairwise, repeat
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, TypeVar

import numpy as np
import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from segfit.assembly.data import batches_in_order
from segfit.assembly.task import assembly_of, planning_of
from segfit.assembly.training import Training, make_training
from segfit.engine.evaluate import evaluate
from segfit.engine.fit import Fit
from segfit.engine.out_of_memory import is_out_of_memory
from segfit.engine.state import derive_seed
from segfit.engine.step import make_update
from segfit.engine.task import Batch, count_samples
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.system.hardware import peak_memory_gib, resolve_device
from segfit.system.monitor import cuda_event
from segfit.tuning.change import changed, thawed

LEAST_STEPS = 3  # however slow a step is
T = TypeVar("T")


@dataclass(frozen=True)
class Speed:
    """One measurement. A step is an update (all its micro-batches), or a held-out batch."""

    samples_per_second: float  # by wall-clock, from an idle device to an idle device
    ms_median: float  # of a step
    ms_p5: float  # its 5th percentile
    ms_p95: float  # its 95th percentile
    steps: int  # that were timed
    peak_gib: float  # allocated CUDA memory meanwhile; CPU: the largest resident set until then
    data_wait: float  # share (0-1) of the wall-clock time that the host waited for data


@dataclass
class Stopwatch:
    """Times the steps of a loop that takes its items from `over`, without making the host wait within it.

    On CUDA an event a step is put into the stream, and the host waits for the device once before the first step and
    once after the last; on the CPU the host's clock is read.
    """

    device: torch.device  # that does the work
    seconds: float  # after which no further step is begun; at least `LEAST_STEPS` are made
    warmup: int  # steps that are made before the clock starts
    speed: Speed = field(init=False)  # once the loop has ended

    def over(self, items: Iterable[T], samples: Callable[[T], int]) -> Iterator[T]:
        """Yield items, each of so many `samples`, first those of the warm-up; a step ends when the next is asked for."""
        items = iter(items)
        yield from islice(items, self.warmup)
        synchronize(self.device)
        cuda, waited, made = self.device.type == "cuda", 0.0, 0
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        mark = cuda_event if cuda else time.perf_counter
        marks: list[Any] = [mark()]
        while len(marks) <= LEAST_STEPS or time.perf_counter() - start < self.seconds:
            asked = time.perf_counter()
            item = next(items)
            waited += time.perf_counter() - asked
            made += samples(item)
            yield item
            marks.append(mark())
        synchronize(self.device)
        seconds = time.perf_counter() - start
        times = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairwise(marks)]
        low, median, high = np.percentile(times, [5, 50, 95]).tolist()
        peak = peak_memory_gib(self.device)
        self.speed = Speed(made / seconds, median, low, high, len(times), peak, waited / seconds)


def synchronize(device: torch.device) -> None:
    """Wait until a CUDA device has done all its work: before and after what is timed."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # synchronises


def train_speed(training: Training, *, seconds: float, warmup: int, resident: bool) -> Speed:
    """Return how fast the engine updates for some `seconds`, after some updates of `warmup`.

    With `resident` the first window of micro-batches is taken again and again from the device's memory, instead of the
    training's own batches as its workers give them. Nothing retries with less when memory runs out. `training` is
    trained by this, so do not use it any more.
    """
    fit = training.fit
    fit.state.train()
    numbers = count()
    watch = Stopwatch(fit.state.device, seconds=seconds, warmup=warmup)
    items = repeat(first_window(fit)) if resident else windows(fit)
    for window in watch.over(items, lambda window: sum(map(count_samples, window))):
        seeds = [derive_seed(fit.options.seed, 0, next(numbers)) for _ in window]
        make_update(fit.state, fit.task, window, seeds, fit.options.clip_grad_norm)
    return watch.speed


def inference_speed(training: Training, *, seconds: float, warmup: int, resident: bool) -> Speed:
    """Return how fast the engine evaluates held-out batches; arguments as `train_speed`, a step is a batch."""
    fit = training.fit
    watch = Stopwatch(fit.state.device, seconds=seconds, warmup=warmup)
    if resident:
        batches: Iterable[Batch] = repeat(first_held_out(fit))
    else:
        batches = chain.from_iterable(fit.held_out() for _ in count())
    model = fit.state.evaluated()
    evaluate(model, fit.task, watch.over(batches, count_samples), fit.state.precision)
    return watch.speed


@contextmanager
def recorded_peak(device: torch.device) -> Iterator[SimpleNamespace]:
    """Record the peak of allocated bytes of the work inside, as `bytes` of what is yielded, once the work is done.

    On CUDA it is the allocator's, of everything that is allocated on the device. On the CPU it is torch's own record of
    what is allocated while the context is open, to the byte and the same in every run: so build the model inside. What
    libraries allocate without torch (oneDNN's weights in its own layouts, NumPy's arrays) is not in it.
    """
    peak = SimpleNamespace(bytes=0)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    # Without it Kineto prints "USDT: … profiler_start", and an ERROR where there is no CUDA driver.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        yield peak
    events = record.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    changes.sort(key=itemgetter(0))
    peak.bytes = max(accumulate(size for _, size in changes), default=0)


@contextmanager
def explain_out_of_memory(config: DictConfig) -> Iterator[None]:
    """Raise a SegFitError with what to do when memory runs out: a measurement does not retry with less."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise SegFitError(
            f"out of memory with batch_size={config.batch_size}: nothing was measured. Set batch_size lower and "
            f"accumulate higher; benchmark=max_batch finds the largest that fits."
        ) from error


def windows(fit: Fit) -> Iterator[list[Batch]]:
    """Yield the micro-batches of one update after the other, epoch after epoch."""
    for epoch in count():
        batches = iter(fit.train.epoch(epoch, 0))
        while window := list(islice(batches, fit.options.accumulate)):
            yield window


def first_window(fit: Fit) -> list[Batch]:
    """Return copies of the first update's micro-batches, in the device's memory; the data workers are ended."""
    return [_kept(batch, fit.train.batches) for batch in next(windows(fit))]  # type: ignore[attr-defined]


def first_held_out(fit: Fit) -> Batch:
    """Return a copy of the first held-out batch, in the device's memory; the data workers are ended."""
    batches = fit.held_out()
    return _kept(next(iter(batches)), batches)


def _kept(batch: Batch, batches: Any) -> Batch:
    # Persistent workers would go on until their queues are full, and beside what is timed take cores from a model on
    # the CPU, and from the host that queues the kernels of one on a card.
    batches.loader._iterator = None
    return {key: value.clone() for key, value in batch.items()}


def measure_training(
    config: DictConfig, *, seconds: float, warmup: int = 5, resident: bool = False
) -> dict[str, Any]:
    """Return `train_speed` of a config's training: "speed": the fields of `Speed`; "facts"; "notices": what fell back."""
    notices: list[str] = []
    with TemporaryDirectory(prefix="segfit-") as folder:
        training = make_training(config, Path(folder), notices.append)
        speed = train_speed(training, seconds=seconds, warmup=warmup, resident=resident)
    return {"speed": asdict(speed), "facts": training.facts, "notices": notices}


def trial_config(config: DictConfig, batch: int) -> DictConfig:
    """Return the config of a trial of a micro-batch: whatever may cost memory in some batch does so in this one."""
    options = {
        "batch_size": batch,
        "loader.workers": 0,  # one batch is enough
        "data.check": "off",  # the parent has checked
        "init": None,
        "data.cache": "none",
        "report.panels": 0,
    }
    return changed(thawed(planning_of(config).costliest(config)), options)


def fits(
    config: DictConfig,
    *,
    budget_gb: float | None,
    margin: float,
    rounds: int,
    seconds: float,
    largest: list[int],
) -> dict[str, Any]:
    """Train and validate with a config's batch; on CUDA nothing past the limit can be allocated.

    Of `budget_gb` GiB (None: what is free on the card) a share of `margin` is kept free. A round trains for `seconds`, but
    at least one update without and three with the optimizer's state, and validates on the held-out images `largest`.

    Return "device" ("cpu" or "cuda"), "peak_bytes" of tensors that torch allocated, "limit_bytes", and "samples_per_second"
    of training, whatever it took to load the batch left out. Raise what `is_out_of_memory` knows, or a SegFitError if the
    training cannot be built.
    """
    device, _ = resolve_device(config.device)
    room = budget_gb * GIB if budget_gb is not None else math.inf
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)  # what contexts and other processes leave
        room = min(room, free)
        torch.cuda.set_per_process_memory_fraction(room * (1 - margin) / total, device)
    with recorded_peak(device) as peak, TemporaryDirectory(prefix="segfit-") as folder:
        training = make_training(config, Path(folder), lambda _: None)
        fit = training.fit
        assembly = assembly_of(config)
        indices = largest[: assembly.held_out_batch_size(config)]
        source = assembly.make_sources(config)["val"]
        dataset = assembly.make_held_out_dataset(config, source)
        held_out = batches_in_order(config, dataset, device, 0, lambda _: None, indices)

        def validate() -> None:
            evaluate(fit.state.evaluated(), fit.task, held_out, fit.state.precision)

        if device.type == "cuda":
            validate()  # cuDNN tries its algorithms once, with more memory than it takes to use them
        for _ in range(rounds):
            speed = train_speed(training, seconds=seconds, warmup=1, resident=True)
            validate()
    return {
        "device": device.type,
        "peak_bytes": peak.bytes,
        "limit_bytes": int(room * (1 - margin)),
        "samples_per_second": speed.samples_per_second,
    }
