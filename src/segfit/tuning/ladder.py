"""benchmark=ladder: what each step from a plain training loop to everything on brings on this machine."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

from omegaconf import DictConfig

from segfit.assembly.data import workers_of
from segfit.assembly.task import assembly_of, planning_of
from segfit.engine.findings import Cell, Findings, Table, columns
from segfit.engine.precision import native_precisions
from segfit.errors import SegFitError
from segfit.system.hardware import available_cores, device_name, resolve_device
from segfit.tuning import Bench
from segfit.tuning.change import Change, augmentation_of, changed, with_batch
from segfit.tuning.climb import KEPT, SPEED_COLUMNS, Climb, Step, bars

SECONDS = 10.0
_COLUMNS = f"rung | samples/s:.1f | × before:.2f | × naive:.2f | kept | {SPEED_COLUMNS}"


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure rung by rung, each on top of those that were faster; raise a SegFitError if the lowest cannot be trained."""
    device, _ = resolve_device(config.device)
    workers = config.benchmark.workers
    if workers is None:
        # at least one, where there is a core for it: the rung shows whether it pays
        workers = max(workers_of(config, device), min(1, available_cores() - 1))
    above = rungs(
        config,
        device_type=device.type,
        precisions=native_precisions(device),
        workers=workers,
        samples=len(assembly_of(config).make_sources(config)["train"]),
    )
    lowest = naive(config)
    climb = Climb(
        changed(config, lowest.options),
        bench,
        seconds=config.seconds or SECONDS,
        total=1 + len(above),
        patience=config.benchmark.timeout_s,
    )
    if climb.measure_start(lowest).speed is None:
        raise SegFitError([f"the lowest rung cannot be trained: {climb.steps[0].verdict}"])
    for rung, missing in above:
        if missing:
            climb.steps.append(Step(rung, missing))
        else:
            climb.step(rung, *smaller(config, rung))
        last = climb.steps[-1]
        if last.speed is None:
            bench.notice(f"{last.change.name}: left out, {last.verdict}.")
    return _findings(config, climb, device_name(device))


def _findings(config: DictConfig, climb: Climb, device: str) -> Findings:
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
    rows: list[list[Cell]] = []
    labels = []
    for step in steps:
        now, kept = step.rate or 0.0, step.verdict == KEPT
        gain = now / step.before if step.before else None
        rows.append([step.change.name, now, gain, now / first, kept, *step.cells()])
        beside = "" if gain is None else f"   {now / first:.2f}× naive, {gain:.2f}× before"
        labels.append(f"{now:.1f}{beside}{'' if kept else ', not kept'}")
    labels += [f"left out: {step.verdict}" for step in left_out]
    emphasis = max(place for place, step in enumerate(steps) if step.verdict == KEPT)
    about = f"{title}: a rung that is not kept is left off from there on"
    tables = [Table("ladder", about, columns(_COLUMNS), rows, emphasis)]
    if left_out:
        missing = [(step.change.name, step.verdict) for step in left_out]
        about = "Not on this machine, or not with this model"
        tables.append(Table("left-out", about, columns("rung | left out because"), missing))
    return Findings(
        headline=headline,
        tables=tables,
        values={
            "steps": [asdict(step) for step in steps],
            "left_out": [asdict(step) for step in left_out],
            "gain": rate / first,
            "overrides": overrides,
        },
        figures={"ladder": partial(bars, [*steps, *left_out], labels, f"{title}\n{device}")},
        scalars={f"ladder/{step.change.name}": step.rate for step in steps},
    )


def naive(config: DictConfig) -> Change:
    """Return the lowest rung: what a plain loop over a plain loader does with this model, batch and data."""
    off = ("loader.pin_memory", "loader.persistent", "loader.non_blocking")
    options = {"precision": "fp32", "loader.workers": 0, "data.cache": "none"}
    options |= dict.fromkeys((*off, "channels_last", "compile"), False)
    if augmentation_of(config) != "none":
        options["augmentation"] = "cpu"
    if "fast" in config.model:
        options["model.fast"] = False
    return Change("naive", {**options, **planning_of(config).feeding(config).plain})


def rungs(
    config: DictConfig, *, device_type: str, precisions: Sequence[str], workers: int, samples: int
) -> list[tuple[Change, str]]:
    """Return the rungs above the lowest, in their order, and why this machine or model lacks one; empty if it does not.

    `precisions` are the native ones, the best for training first; `samples` are those of the training data.
    """
    best, feeding = precisions[0], planning_of(config).feeding(config)
    larger = min(config.benchmark.batch_size or 4 * config.batch_size, samples)
    sizes = [larger * times for times in feeding.larger if larger * times <= samples]
    batches = [with_batch(config, size) for size in sizes]
    plain = augmentation_of(config) == "none"
    lacks = [
        ("precision", best == "fp32", f"this {device_type.upper()} has no native bf16 or fp16"),
        ("loader.workers", workers == 0, "there is no core for them"),
        ("loader.pin_memory", device_type != "cuda", "there is no card to copy to"),
        ("augmentation", plain, "augmentation=none: there is nothing to move"),
    ]
    missing = {**feeding.idle, **{key: why for key, lacking, why in lacks if lacking}}
    if larger <= config.batch_size:
        batches = [Change("larger batch", {"batch_size": larger})]
        asked = f"batch_size={config.batch_size}"
        missing["batch_size"] = f"{asked} is the largest that is asked for, or all samples"
    if "fast" not in config.model:
        missing["model.fast"] = f"model.name={config.model.name} is no SegFormer"
    mixed = "mixed precision" + ("" if best == "fp32" else f" ({best})")
    reading = f"{workers or ''} data worker{'' if workers == 1 else 's'}".strip()
    copies = {"loader.pin_memory": True, "loader.non_blocking": True}
    above = [
        Change(mixed, {"precision": best}),
        *batches,
        Change(reading, {"loader.workers": workers, "loader.persistent": True}),
        Change("pinned memory, copies beside the step", copies),
        Change("decoded cache", {"data.cache": config.benchmark.cache}),
        Change("augmentation on the device", {"augmentation": "kornia-gpu"}),
        Change("fast SegFormer", {"model.fast": True}),
        Change("channels_last", {"channels_last": True}),
        *(Change(name, options) for name, options in feeding.faster.items()),
        Change("compile", {"compile": True}),
    ]
    return [
        (rung, next((missing[key] for key in rung.options if key in missing), "")) for rung in above
    ]


def smaller(config: DictConfig, rung: Change) -> Iterator[Change]:
    """Yield half of a larger batch, a quarter, and so on, as long as it is larger than the config's."""
    batch = rung.options.get("batch_size", 0) // 2
    while batch > config.batch_size:
        yield with_batch(config, batch)
        batch //= 2
