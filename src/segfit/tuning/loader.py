"""benchmark=loader: how fast batches come, and the smallest setting that outruns the model."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.data import cached_sources, make_sources, make_train_batches
from segfit.assembly.training import make_training
from segfit.engine.findings import Column, Findings, Table
from segfit.errors import SegFitError
from segfit.system.cores import available_cores
from segfit.system.hardware import device_name, resolve_device
from segfit.tuning.bench import Bench
from segfit.tuning.measure import Speed, data_speed, train_speed
from segfit.tuning.rungs import typed
from segfit.tuning.throughput import told_if_out_of_memory

SECONDS = 5.0
ON_DEVICE = "kornia-gpu"
_CACHES = ("none", "disk", "ram")  # from the smallest to what takes most
_COLUMNS = (
    Column("augmentation"),
    Column("cache"),
    Column("workers"),
    Column("prefetch"),
    Column("img/s", ".1f"),
    Column("× model", ".2f"),
    Column("training img/s", ".1f"),
    Column("outruns"),
)


@dataclass(frozen=True)
class Setting:
    """One way to feed a training.

    Args:
        augmentation: `augmentation.name`: "none", "cpu" (in the workers) or "kornia-gpu" (on the device).
        cache: `data.cache`.
        workers: `loader.workers`.
        prefetch: `loader.prefetch`; None where there are no workers.
    """

    augmentation: str
    cache: str
    workers: int
    prefetch: int | None

    def changes(self) -> dict[str, str | int]:
        """Return config key → value."""
        changes: dict[str, str | int] = {
            "augmentation.name": self.augmentation,
            "data.cache": self.cache,
            "loader.workers": self.workers,
        }
        return changes if self.prefetch is None else {**changes, "loader.prefetch": self.prefetch}

    def size(self) -> tuple[int, int, int]:
        """Return what "smallest" means: first workers, then the cache, then batches that wait."""
        return self.workers, _CACHES.index(self.cache), self.prefetch or 0


@dataclass(frozen=True)
class Fed:
    """A setting that was measured.

    Args:
        setting: how batches were made.
        data: their speed, with nothing done to them.
        model: images a second of an update on resident batches, with the augmentation that is the device's.
    """

    setting: Setting
    data: float
    model: float

    @property
    def outruns(self) -> bool:
        """Whether the model never waits, in the mean; without workers it waits for every batch."""
        return self.setting.workers > 0 and self.data > self.model

    @property
    def reached(self) -> float:
        """Images a second of a training, at best: without workers data and model take turns."""
        if self.setting.workers == 0:
            return 1 / (1 / self.data + 1 / self.model)
        return min(self.data, self.model)


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure the data side over workers × prefetch × cache × place of augmentation, and the bare update.

    Raises:
        SegFitError: if the data set is faulty or an update does not fit into memory.
    """
    settings = list(grid(config))
    places = list(dict.fromkeys(setting.augmentation for setting in settings))
    total = len(places) + len(settings)
    models: dict[str, float] = {}
    once = Bench(
        bench.folder, functools.cache(bench.notice), bench.progress
    )  # every build tells the same
    for done, place in enumerate(places):
        bench.progress(f"the model alone, augmentation={place}", done, total)
        # no worker beside the model: those of the recipe would take its cores while they fill their queues
        alone = _changed(config, {"augmentation.name": place, "loader.workers": 0})
        models[place] = _model_speed(alone, once)
    measured: list[Fed] = []
    for done, setting in enumerate(settings, start=len(places)):
        bench.progress(typed(setting.changes()), done, total)
        try:
            speed = _data_speed(_changed(config, setting.changes()))
        except SegFitError as error:
            bench.notice(f"{typed(setting.changes())}: left out, {' '.join(error.problems)}")
            continue
        measured.append(Fed(setting, speed.samples_per_second, models[setting.augmentation]))
    if not measured:
        raise SegFitError("no setting of the data side could be measured; see the lines above.")
    return _findings(config, measured)


def grid(config: DictConfig) -> Iterator[Setting]:
    """Yield every setting that a config asks for."""
    asked = config.benchmark
    places = ["none"] if config.augmentation.name == "none" else ["cpu", ON_DEVICE]
    for place in places:
        for cache in asked.caches:
            for workers in asked.workers or worker_counts(available_cores()):
                for prefetch in asked.prefetch if workers else [None]:
                    yield Setting(place, cache, workers, prefetch)


def worker_counts(cores: int) -> list[int]:
    """Return 0, the powers of two below `cores`, and `cores`."""
    powers = [2**exponent for exponent in range(cores.bit_length()) if 2**exponent < cores]
    return [0, *powers, cores]


def choose(measured: Sequence[Fed]) -> Fed:
    """Return the smallest setting of those that outrun the fastest model; if none does, the one that reaches most."""
    enough = [fed for fed in measured if fed.outruns]
    if not enough:
        return max(measured, key=lambda fed: fed.reached)
    fastest = max(fed.model for fed in enough)
    return min((fed for fed in enough if fed.model == fastest), key=lambda fed: fed.setting.size())


def _changed(config: DictConfig, changes: dict[str, str | int]) -> DictConfig:
    changed = config.copy()
    for key, value in changes.items():
        OmegaConf.update(changed, key, value)
    return changed


def _model_speed(config: DictConfig, bench: Bench) -> float:
    with told_if_out_of_memory(config):
        training = make_training(config, bench.folder, bench.notice)
        speed = train_speed(
            training,
            seconds=config.seconds or SECONDS,
            warmup=config.benchmark.warmup,
            resident=True,
        )
    return speed.samples_per_second


def _data_speed(config: DictConfig) -> Speed:
    """Return how fast batches come; their workers are gone afterwards."""
    device, _ = resolve_device(config.device)
    sources, _ = cached_sources(config, make_sources(config.data))
    workers = config.loader.workers
    batches = make_train_batches(config, sources["train"], device, workers)
    # what workers have ready when the clock starts would count as made in no time
    warmup = 1 + workers * config.loader.prefetch
    return data_speed(batches, device, seconds=config.seconds or SECONDS, warmup=warmup)


def _findings(config: DictConfig, measured: Sequence[Fed]) -> Findings:
    best = choose(measured)
    device, _ = resolve_device(config.device)
    rows = [
        (
            fed.setting.augmentation,
            fed.setting.cache,
            fed.setting.workers,
            fed.setting.prefetch,
            fed.data,
            fed.data / fed.model,
            fed.reached,
            fed.outruns,
        )
        for fed in measured
    ]
    models = {fed.setting.augmentation: fed.model for fed in measured}
    told = " and ".join(f"{rate:.1f} with augmentation={place}" for place, rate in models.items())
    return Findings(
        headline=f"{_verdict(best)}{_caution(device, best)}",
        tables=[
            Table(
                "loader",
                f"The data side alone; the model alone trains {told} images/s",
                _COLUMNS,
                rows,
                emphasis=list(measured).index(best),
            )
        ],
        values={
            "settings": [
                {
                    **asdict(fed.setting),
                    "data": fed.data,
                    "model": fed.model,
                    "reached": fed.reached,
                    "outruns": fed.outruns,
                }
                for fed in measured
            ],
            "chosen": best.setting.changes(),
            "overrides": typed(best.setting.changes()),
        },
        figures={"loader": partial(figure, measured, device_name(device))},
        scalars={f"loader/{typed(fed.setting.changes())}": fed.data for fed in measured},
    )


def _verdict(best: Fed) -> str:
    words = typed(best.setting.changes())
    if best.outruns:
        return (
            f"The smallest setting that outruns the model: {words} ({best.data:.1f} images/s against "
            f"{best.model:.1f})."
        )
    return (
        f"No setting outruns the model. The best: {words} ({best.data:.1f} images/s against {best.model:.1f}), "
        f"so the device waits {100 * (1 - best.reached / best.model):.0f} % of the time."
    )


def _caution(device: torch.device, best: Fed) -> str:
    if device.type == "cuda" or best.setting.workers == 0:
        return ""
    return (
        " On a CPU workers take cores from the model: see what is left with benchmark=throughput."
    )


def figure(measured: Sequence[Fed], title: str) -> Figure:
    """Draw images a second over workers, a line a way to feed, and what the model asks for."""
    places = list(dict.fromkeys(fed.setting.augmentation for fed in measured))
    drawing = Figure(figsize=(4.6 * len(places) + 0.6, 3.8), dpi=100, layout="constrained")
    top = 1.1 * max(max(fed.data, fed.model) for fed in measured)
    for index, place in enumerate(places):
        axes = drawing.add_subplot(1, len(places), index + 1)
        here = [fed for fed in measured if fed.setting.augmentation == place]
        for key in dict.fromkeys((fed.setting.cache, fed.setting.prefetch) for fed in here):
            line = [fed for fed in here if (fed.setting.cache, fed.setting.prefetch) == key]
            label = f"cache {key[0]}" + (f", prefetch {key[1]}" if key[1] else ", no workers")
            axes.plot(
                [fed.setting.workers for fed in line], [fed.data for fed in line], "o-", label=label
            )
        axes.axhline(here[0].model, color="black", linestyle="--", label="the model alone")
        axes.set_xticks(sorted({fed.setting.workers for fed in measured}))
        axes.set(xlabel="data workers", ylim=(0, top), title=f"augmentation={place}")
        axes.spines[["top", "right"]].set_visible(False)
        if index == 0:
            axes.set_ylabel("images a second")
        axes.legend(fontsize=8)
    drawing.suptitle(title, fontsize=9)
    return drawing
