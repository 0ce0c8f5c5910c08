"""benchmark=loader: how fast batches come, and the smallest setting that outruns the model."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from importlib.util import find_spec
from itertools import chain, count, product
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly.data import cached_sources, make_train_batches
from segfit.assembly.task import assembly_of, planning_of
from segfit.data.source import Source
from segfit.engine.findings import Findings, Table, columns
from segfit.engine.task import count_samples
from segfit.errors import SegFitError
from segfit.system.hardware import available_cores, resolve_device
from segfit.tuning import Bench
from segfit.tuning.change import Change, augmentation_of, changed
from segfit.tuning.measure import Stopwatch, explain_out_of_memory, measure_training

SECONDS = 5.0
_CACHES = ("none", "disk", "ram")  # from the smallest to what takes most
_SPEEDS = "samples/s:.1f | × model:.2f"
_COLUMNS = (
    f"augmentation | cache | workers | prefetch | {_SPEEDS} | training samples/s:.1f | outruns"
)


@dataclass(frozen=True)
class Fed:
    """A way to feed a training, and its speed in samples per second."""

    augmentation: str  # "none", "cpu" (in the workers) or "kornia-gpu" (on the device)
    cache: str | None  # `data.cache`; None where that changes nothing
    workers: int
    prefetch: int | None  # None if there are no workers
    data: float = 0.0  # of the data side alone
    model: float = 0.0  # of an update on resident batches, augmentation on the device included

    @property
    def change(self) -> Change:
        """The change to this way of feeding."""
        options = {
            "augmentation": None if self.augmentation == "none" else self.augmentation,
            "data.cache": self.cache,
            "loader.workers": self.workers,
            "loader.prefetch": self.prefetch,
        }
        return Change("feeding", {key: one for key, one in options.items() if one is not None})

    @property
    def outruns(self) -> bool:
        """Whether the model never waits, in the mean; without workers it waits for every batch."""
        return self.workers > 0 and self.data > self.model

    @property
    def reached(self) -> float:
        """Samples per second of a training, at best: without workers data and model take turns."""
        if self.workers == 0:
            return 1 / (1 / self.data + 1 / self.model)
        return min(self.data, self.model)


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure all ways to feed, and the bare update; raise a SegFitError if data are faulty or an update does not fit."""
    asked, ways = config.benchmark, list(grid(config))
    if asked.dali and not (find_spec("nvidia") and find_spec("nvidia.dali")):
        raise SegFitError("benchmark.dali=true needs DALI: pip install -r requirements-dali.txt")
    if asked.dali and "image_size" not in config:
        raise SegFitError(f"benchmark.dali=true: task={config.task.name} cannot be fed by DALI.")
    places = list(dict.fromkeys(way.augmentation for way in ways))
    total, seconds = len(places) + len(ways), config.seconds or SECONDS
    models: dict[str, float] = {}
    for done, place in enumerate(places):
        bench.progress(f"the model alone, augmentation={place}", done, total)
        # no worker beside the model: those of the recipe would take its cores while they fill their queues
        alone = changed(config, Fed(place, None, 0, None).change.options)
        with explain_out_of_memory(alone):
            found = measure_training(alone, seconds=seconds, warmup=asked.warmup, resident=True)
        for line in found["notices"]:
            bench.notice(line)
        models[place] = found["speed"]["samples_per_second"]
    measured: list[Fed] = []
    for done, way in enumerate(ways, start=len(places)):
        bench.progress(way.change.typed, done, total)
        try:
            data = _data_speed(changed(config, way.change.options), seconds)
        except SegFitError as error:
            bench.notice(f"{way.change.typed}: left out, {' '.join(error.problems)}")
            continue
        measured.append(replace(way, data=data, model=models[way.augmentation]))
    if not measured:
        raise SegFitError("no setting of the data side could be measured; see the lines above.")
    best = choose(measured)
    rates = " and ".join(f"{rate:.1f} with augmentation={place}" for place, rate in models.items())
    title = f"The data side alone; the model alone trains {rates} samples/s"
    rows = [
        (*astuple(fed)[:-1], fed.data / fed.model, fed.reached, fed.outruns) for fed in measured
    ]
    tables = [Table("loader", title, columns(_COLUMNS), rows, emphasis=measured.index(best))]
    if asked.dali:
        tables += _dali(config, bench, models[places[-1]], seconds)
    settings = [{**asdict(fed), "reached": fed.reached, "outruns": fed.outruns} for fed in measured]
    return Findings(
        headline=headline(best, resolve_device(config.device)[0].type),
        tables=tables,
        values={
            "settings": settings,
            "chosen": best.change.options,
            "overrides": best.change.typed,
        },
        scalars={f"loader/{fed.change.typed}": fed.data for fed in measured},
    )


def grid(config: DictConfig) -> Iterator[Fed]:
    """Yield every setting that a config asks for; raise a SegFitError if its samples are not read by workers."""
    asked, idle = config.benchmark, planning_of(config).feeding(config).idle
    if "loader.workers" in idle:
        raise SegFitError(
            f"benchmark=loader: task={config.task.name} has no data side to measure: {idle['loader.workers']}."
        )
    places = ["none"] if augmentation_of(config) == "none" else ["cpu", "kornia-gpu"]
    caches = [None] if "data.cache" in idle else asked.caches
    counts = asked.workers or worker_counts(available_cores())
    for place, cached, workers in product(places, caches, counts):
        for prefetch in asked.prefetch if workers else [None]:
            yield Fed(place, cached, workers, prefetch)


def worker_counts(cores: int) -> list[int]:
    """Return 0, the powers of two below `cores`, and `cores`."""
    powers = [2**exponent for exponent in range(cores.bit_length()) if 2**exponent < cores]
    return [0, *powers, cores]


def choose(measured: Sequence[Fed]) -> Fed:
    """Return the smallest setting of those that outrun the fastest model; if none does, the one that reaches most.

    The smallest has fewest workers, then the cheapest cache, then fewest batches that wait.
    """
    enough = [fed for fed in measured if fed.outruns]
    if not enough:
        return max(measured, key=lambda fed: fed.reached)
    fastest = max(fed.model for fed in enough)
    return min(
        (fed for fed in enough if fed.model == fastest),
        key=lambda fed: (fed.workers, _CACHES.index(fed.cache or "none"), fed.prefetch or 0),
    )


def _data_speed(config: DictConfig, seconds: float) -> float:
    """Return how many samples come a second; their workers are gone afterwards."""
    device, _ = resolve_device(config.device)
    sources, _ = cached_sources(config, assembly_of(config).make_sources(config))
    workers = config.loader.workers
    batches = make_train_batches(config, sources["train"], device, workers)
    # what workers have ready when the clock starts would count as made in no time
    watch = Stopwatch(device, seconds, warmup=1 + workers * config.loader.prefetch)
    epochs = chain.from_iterable(batches.epoch(epoch, 0) for epoch in count())
    for _ in watch.over(epochs, count_samples):
        pass
    return watch.speed.samples_per_second


def _dali(config: DictConfig, bench: Bench, model: float, seconds: float) -> list[Table]:
    """Return a table of how fast DALI feeds a model that trains so many samples a second; none if it cannot, with a notice."""
    source = assembly_of(config).make_sources(config)["train"]
    device, _ = resolve_device(config.device)
    size = tuple(planning_of(config).train_example(config)["image"].shape[-2:])
    rows = []
    for threads in filter(None, config.benchmark.workers or worker_counts(available_cores())):
        watch = Stopwatch(device, seconds, warmup=2)
        try:
            batches = dali_batches(source, size, config.batch_size, threads, device)
            for _ in watch.over(batches, lambda _: config.batch_size):
                pass
        except SegFitError as error:
            bench.notice(f"left out: {' '.join(error.problems)}")
            return []
        speed = watch.speed.samples_per_second
        rows.append((threads, speed, speed / model))
    return [Table("dali", "DALI, same files", columns(f"threads | {_SPEEDS}"), rows)]


def dali_batches(
    source: Source, size: tuple[int, ...], batch_size: int, threads: int, device: torch.device
) -> Iterator[Any]:
    """Yield batches of a source's files in random order, without end, resized to `size` = (h, w).

    The first file of a sample is decoded as RGB, by the device if it is a CUDA one; others as grey images. Raises a SegFitError
    if a sample has no file, or DALI cannot read one.
    """
    from nvidia.dali import Pipeline, fn, types

    samples = [[str(path) for path in source.files(index)] for index in range(len(source))]
    if not all(samples):
        raise SegFitError("DALI: the samples are no image files.")
    random.Random(0).shuffle(samples)
    on_card, outputs = device.type == "cuda", []
    try:
        with Pipeline(batch_size, threads, device.index or 0 if on_card else None) as pipeline:
            for place, paths in enumerate(zip(*samples, strict=True)):
                image = fn.decoders.image(
                    fn.readers.file(files=[*paths])[0],
                    device="mixed" if on_card else "cpu",
                    output_type=types.GRAY if place else types.RGB,
                )
                kind = types.INTERP_NN if place else types.INTERP_LINEAR
                outputs.append(fn.resize(image, size=size, interp_type=kind, antialias=not place))
            pipeline.set_outputs(*outputs)
        while True:
            yield pipeline.run()
    except (RuntimeError, ValueError) as error:  # ValueError: samples of different numbers of files
        raise SegFitError(f"DALI: {str(error).strip().splitlines()[0]}") from error


def headline(best: Fed, device_type: str) -> str:
    """Return what the best setting is, and whether the model waits for it."""
    speeds = f"{best.change.typed} ({best.data:.1f} samples/s against {best.model:.1f})"
    line = f"The smallest setting that outruns the model: {speeds}."
    if not best.outruns:
        waits = 100 * (1 - best.reached / best.model)
        line = f"No setting outruns the model. The best: {speeds}, so the device waits {waits:.0f} % of the time."
    if device_type == "cpu" and best.workers > 0:
        line += " On a CPU workers take cores from the model: see what is left with benchmark=throughput."
    return line
