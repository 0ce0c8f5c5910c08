"""benchmark=ladder: what each step from a plain training loop to everything on brings on this machine."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.data import make_sources, workers_of
from segfit.engine.findings import Column, Findings, Table
from segfit.engine.precision import native_precisions
from segfit.errors import SegFitError
from segfit.system.cores import available_cores
from segfit.system.hardware import device_name, resolve_device
from segfit.tuning.bench import Bench
from segfit.tuning.measure import Speed
from segfit.tuning.rungs import Machine, Rung, naive, rungs, typed, with_batch
from segfit.tuning.trial import Outcome, run_trial

SECONDS = 10.0
_COLUMNS = (
    Column("rung"),
    Column("img/s", ".1f"),
    Column("× before", ".2f"),
    Column("× naive", ".2f"),
    Column("kept"),
    Column("ms", ".1f"),
    Column("wait %", ".1f"),
    Column("GiB", ".2f"),
)


@dataclass(frozen=True)
class Step:
    """A rung that was measured.

    Args:
        rung: the change.
        speed: with it, and with all that was kept before it.
        before: images a second without it.
        kept: it is faster than what was kept before, so the rungs above stand on it.
        facts: of the training that was measured.
    """

    rung: Rung
    speed: Speed
    before: float
    kept: bool
    facts: Mapping[str, str]


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure a training rung by rung, each in a process of its own.

    A rung is measured on top of those that were kept. It is kept if it is faster than what stands; one that is not
    is shown, and left off from there on.

    Raises:
        SegFitError: if the lowest rung cannot be trained.
    """
    machine = machine_of(config)
    lowest, above = naive(config), rungs(config, machine)
    total = 1 + len(above)
    bench.progress(lowest.name, 0, total)
    changes = dict(lowest.changes)
    outcome = _trial(config, changes)
    if not outcome.ok:
        raise SegFitError([f"the lowest rung cannot be trained: {outcome.message}"])
    first = Speed(**outcome.values["speed"])
    steps = [Step(lowest, first, first.samples_per_second, True, outcome.values["facts"])]
    left_out: list[Rung] = []
    best = first.samples_per_second
    for done, rung in enumerate(above, start=1):
        bench.progress(rung.name, done, total)
        tried, outcome = _climb(config, changes, rung)
        missing = tried.missing or _refused(tried, outcome)
        if missing:
            left_out.append(Rung(tried.name, tried.changes, missing))
            bench.notice(f"{tried.name}: left out, {missing}.")
            continue
        speed = Speed(**outcome.values["speed"])
        kept = speed.samples_per_second > best
        steps.append(Step(tried, speed, best, kept, outcome.values["facts"]))
        if kept:
            best = speed.samples_per_second
            changes.update(tried.changes)
    return _findings(config, machine, steps, left_out)


def machine_of(config: DictConfig) -> Machine:
    """Return what decides which rungs a config has on this machine."""
    device, _ = resolve_device(config.device)
    workers = config.benchmark.workers
    if workers is None:
        # at least one, where there is a core for it: whether it pays is what the rung shows
        workers = max(workers_of(config, device), min(1, available_cores() - 1))
    images = len(make_sources(config.data)["train"])
    return Machine(device.type, native_precisions(device), workers, images)


def _climb(config: DictConfig, changes: Mapping[str, Any], rung: Rung) -> tuple[Rung, Outcome]:
    """Try a rung on top of `changes`; a larger batch that does not fit is halved until it does."""
    outcome = Outcome(ok=False)
    for candidate in _smaller(config, rung):
        rung = candidate
        if rung.missing:
            break
        outcome = _trial(config, {**changes, **rung.changes})
        if outcome.reason != "oom":
            break
    return rung, outcome


def _smaller(config: DictConfig, rung: Rung) -> Iterator[Rung]:
    yield rung
    batch = rung.changes.get("batch_size", 0) // 2
    while batch > config.batch_size:
        yield with_batch(config, batch)
        batch //= 2


def _trial(config: DictConfig, changes: Mapping[str, Any]) -> Outcome:
    changed = config.copy()
    for key, value in changes.items():
        OmegaConf.update(changed, key, value)
    return run_trial(
        changed,
        job="train_speed",
        timeout_s=config.benchmark.timeout_s,
        seconds=config.seconds or SECONDS,
        warmup=config.benchmark.warmup,
    )


def _refused(rung: Rung, outcome: Outcome) -> str:
    """Return why a rung that was tried does not count, or nothing."""
    if not outcome.ok:
        return "out of memory" if outcome.reason == "oom" else outcome.message
    if rung.changes.get("compile") and outcome.values["facts"]["compiled"] == "no":
        notices = [line for line in outcome.values["notices"] if line.startswith("compile=true")]
        return " ".join(notices).rstrip(".")
    return ""


def _findings(
    config: DictConfig, machine: Machine, steps: Sequence[Step], left_out: Sequence[Rung]
) -> Findings:
    first = steps[0].speed.samples_per_second
    kept = [step for step in steps if step.kept]
    best = kept[-1]
    changes = {key: value for step in kept[1:] for key, value in step.rung.changes.items()}
    rate = best.speed.samples_per_second
    title = f"{steps[0].facts['model']}, {steps[0].facts['image size']}, batch {config.batch_size}"
    headline = f"Nothing is faster than the naive {first:.1f} images/s here."
    if changes:
        headline = f"{rate / first:.2f} times as fast: {first:.1f} → {rate:.1f} images/s with {typed(changes)}"
    tables = [
        Table(
            "ladder",
            f"{title}: a rung that is not kept is left off from there on",
            _COLUMNS,
            [_row(step, first) for step in steps],
            emphasis=steps.index(best),
        )
    ]
    if left_out:
        columns = (Column("rung"), Column("left out because"))
        rows = [(rung.name, rung.missing) for rung in left_out]
        tables.append(
            Table("left-out", "Not on this machine, or not with this model", columns, rows)
        )
    device, _ = resolve_device(config.device)
    return Findings(
        headline=headline,
        tables=tables,
        values={
            "machine": asdict(machine),
            "steps": [asdict(step) for step in steps],
            "left_out": [asdict(rung) for rung in left_out],
            "gain": rate / first,
            "overrides": typed(changes),
        },
        figures={"ladder": partial(figure, steps, left_out, f"{title}\n{device_name(device)}")},
        scalars={f"ladder/{step.rung.name}": step.speed.samples_per_second for step in steps},
    )


def _row(step: Step, first: float) -> list[str | float | int | bool | None]:
    speed, lowest = step.speed, step.rung.name == "naive"
    rate = speed.samples_per_second
    return [
        step.rung.name,
        rate,
        None if lowest else rate / step.before,
        rate / first,
        step.kept,
        speed.ms_median,
        100 * speed.data_wait,
        speed.peak_gib,
    ]


def figure(steps: Sequence[Step], left_out: Sequence[Rung], title: str) -> Figure:
    """Draw a bar a rung: images a second, and how many times the naive loop's and the rung before's."""
    count = len(steps) + len(left_out)
    drawing = Figure(figsize=(9, 0.45 * count + 1.3), dpi=100, layout="constrained")
    axes = drawing.add_subplot()
    first = steps[0].speed.samples_per_second
    rates = [step.speed.samples_per_second for step in steps]
    colors = ["#3a7ca5" if step.kept else "#c8c8c8" for step in steps]
    axes.barh(range(len(steps)), rates, color=colors)
    for place, step in enumerate(steps):
        rate = step.speed.samples_per_second
        label = f"{rate:.1f}" if place == 0 else f"{rate:.1f}   {rate / first:.2f}× naive"
        change = "" if place == 0 else f", {rate / step.before:.2f}× before"
        axes.text(rate, place, f" {label}{change}{'' if step.kept else ', not kept'}", va="center")
    for place, rung in enumerate(left_out, start=len(steps)):
        axes.text(0, place, f" left out: {_shortened(rung.missing)}", va="center", color="#777777")
    names = [step.rung.name for step in steps] + [rung.name for rung in left_out]
    axes.set_yticks(range(count), names)
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_xlim(0, 1.7 * max(rates))  # room for the words beside the longest bar
    axes.set_xlabel("images a second in training")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return drawing


def _shortened(text: str) -> str:
    return text if len(text) <= 70 else f"{text[:69]}…"
