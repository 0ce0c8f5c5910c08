"""benchmark=ladder: what each step from a plain training loop to everything on brings on this machine."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from omegaconf import DictConfig

from segfit.assembly.data import workers_of
from segfit.assembly.task import assembly_of
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.engine.precision import native_precisions
from segfit.errors import SegFitError
from segfit.system.cores import available_cores
from segfit.system.hardware import device_name, resolve_device
from segfit.tuning.bench import Bench
from segfit.tuning.change import Change, augmentation_of, changed
from segfit.tuning.climb import KEPT, SPEED_COLUMNS, Climb, Step, bars

SECONDS = 10.0
_COLUMNS = (
    Column("rung"),
    Column("samples/s", ".1f"),
    Column("× before", ".2f"),
    Column("× naive", ".2f"),
    Column("kept"),
    *SPEED_COLUMNS,
)


@dataclass(frozen=True)
class Machine:
    """What decides which rungs there are; `precisions` are the native ones, the best for training first."""

    device_type: str
    precisions: Sequence[str]
    workers: int
    samples: int


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure a training rung by rung, each on top of those that were faster than what stood before.

    Raises:
        SegFitError: if the lowest rung cannot be trained.
    """
    machine = machine_of(config)
    lowest, above = naive(config), rungs(config, machine)
    climb = Climb(
        changed(config, lowest.options),
        bench,
        seconds=config.seconds or SECONDS,
        total=1 + len(above),
        patience=config.benchmark.timeout_s,
    )
    if climb.measure_start(lowest).speed is None:
        raise SegFitError([f"the lowest rung cannot be trained: {climb.steps[0].verdict}"])
    for rung in above:
        if rung.missing:
            climb.steps.append(Step(rung, rung.missing))
        else:
            climb.step(rung, *smaller(config, rung))
        last = climb.steps[-1]
        if last.speed is None:
            bench.notice(f"{last.change.name}: left out, {last.verdict}.")
    return _findings(config, machine, climb)


def machine_of(config: DictConfig) -> Machine:
    """Return what decides which rungs a config has on this machine."""
    device, _ = resolve_device(config.device)
    workers = config.benchmark.workers
    if workers is None:
        # at least one, where there is a core for it: the rung shows whether it pays
        workers = max(workers_of(config, device), min(1, available_cores() - 1))
    samples = len(assembly_of(config).make_sources(config)["train"])
    return Machine(device.type, native_precisions(device), workers, samples)


def _findings(config: DictConfig, machine: Machine, climb: Climb) -> Findings:
    steps = [step for step in climb.steps if step.speed is not None]
    left_out = [step for step in climb.steps if step.speed is None]
    first, rate = steps[0].rate or 0.0, climb.best or 0.0
    overrides = Change("result", climb.kept).typed
    title = f"{steps[0].facts['model']}, {steps[0].facts['sample']}, batch {config.batch_size}"
    headline = f"Nothing is faster than the naive {first:.1f} samples/s here."
    if overrides:
        headline = (
            f"{rate / first:.2f} times as fast: {first:.1f} → {rate:.1f} samples/s with {overrides}"
        )
    tables = [
        Table(
            "ladder",
            f"{title}: a rung that is not kept is left off from there on",
            _COLUMNS,
            [_row(step, first) for step in steps],
            emphasis=max(place for place, step in enumerate(steps) if step.verdict == KEPT),
        )
    ]
    if left_out:
        columns = (Column("rung"), Column("left out because"))
        rows = [(step.change.name, step.verdict) for step in left_out]
        tables.append(
            Table("left-out", "Not on this machine, or not with this model", columns, rows)
        )
    device, _ = resolve_device(config.device)
    shown = [*steps, *left_out]
    return Findings(
        headline=headline,
        tables=tables,
        values={
            "machine": asdict(machine),
            "steps": [asdict(step) for step in steps],
            "left_out": [asdict(step) for step in left_out],
            "gain": rate / first,
            "overrides": overrides,
        },
        figures={"ladder": partial(bars, shown, _labels(shown), f"{title}\n{device_name(device)}")},
        scalars={f"ladder/{step.change.name}": step.rate or 0.0 for step in steps},
    )


def _row(step: Step, first: float) -> list[Cell]:
    rate = step.rate or 0.0
    gain = rate / step.before if step.before else None
    return [step.change.name, rate, gain, rate / first, step.verdict == KEPT, *step.cells()]


def _labels(steps: Sequence[Step]) -> list[str]:
    first = steps[0].rate or 0.0
    labels = []
    for step in steps:
        if step.rate is None:
            labels.append(f"left out: {step.verdict}")
        elif step.before is None:
            labels.append(f"{step.rate:.1f}")
        else:
            kept = "" if step.verdict == KEPT else ", not kept"
            gains = f"{step.rate / first:.2f}× naive, {step.rate / step.before:.2f}× before"
            labels.append(f"{step.rate:.1f}   {gains}{kept}")
    return labels


def naive(config: DictConfig) -> Change:
    """Return the lowest rung: what a plain loop over a plain loader does with this model, batch and data."""
    options = {
        "precision": "fp32",
        "loader.workers": 0,
        "loader.pin_memory": False,
        "loader.persistent": False,
        "loader.non_blocking": False,
        "data.cache": "none",
        "channels_last": False,
        "compile": False,
    }
    if augmentation_of(config) != "none":
        options["augmentation"] = "cpu"
    if "fast" in config.model:
        options["model.fast"] = False
    return Change("naive", options)


def rungs(config: DictConfig, machine: Machine) -> list[Change]:
    """Return the rungs above the lowest, in their order."""
    best, kind = machine.precisions[0], machine.device_type
    larger = min(config.benchmark.batch_size or 4 * config.batch_size, machine.samples)
    workers = f"{machine.workers} data worker{'s' if machine.workers > 1 else ''}"
    copies = "pinned memory, copies beside the step"
    on_device = "augmentation on the device"
    return [
        Change("mixed precision", missing=f"this {kind.upper()} has no native bf16 or fp16")
        if best == "fp32"
        else Change(f"mixed precision ({best})", {"precision": best}),
        Change(
            "larger batch",
            missing=f"batch_size={config.batch_size} is the largest that is asked for, or all samples",
        )
        if larger <= config.batch_size
        else with_batch(config, larger),
        Change("data workers", missing="there is no core for them")
        if machine.workers == 0
        else Change(workers, {"loader.workers": machine.workers, "loader.persistent": True}),
        Change(copies, {"loader.pin_memory": True, "loader.non_blocking": True})
        if kind == "cuda"
        else Change(copies, missing="there is no card to copy to"),
        Change("decoded cache", {"data.cache": config.benchmark.cache}),
        Change(on_device, missing="augmentation=none: there is nothing to move")
        if augmentation_of(config) == "none"
        else Change(on_device, {"augmentation": "kornia-gpu"}),
        Change("fast SegFormer", {"model.fast": True})
        if "fast" in config.model
        else Change("fast SegFormer", missing=f"model.name={config.model.name} is no SegFormer"),
        Change("channels_last", {"channels_last": True}),
        Change("compile", {"compile": True}),
    ]


def with_batch(config: DictConfig, batch_size: int) -> Change:
    """Return the rung of a larger batch; accumulation is lowered by as much, as far as there is any."""
    accumulate = max(1, config.accumulate * config.batch_size // batch_size)
    options = {"batch_size": batch_size}
    if accumulate != config.accumulate:
        options["accumulate"] = accumulate
    return Change(f"batch {batch_size}", options)


def smaller(config: DictConfig, rung: Change) -> Iterator[Change]:
    """Yield half of a larger batch, a quarter, and so on, as long as it is larger than the config's."""
    batch = rung.options.get("batch_size", 0) // 2
    while batch > config.batch_size:
        yield with_batch(config, batch)
        batch //= 2
