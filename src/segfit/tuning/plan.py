"""benchmark=plan: will it fit, before anything is downloaded or a card is there? See docs/plan.md."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from itertools import islice, product
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.config.tasks import schema_of
from segfit.engine.findings import Cell, Column, Findings, Table, columns
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.tuning import Bench
from segfit.tuning.change import Change, changed
from segfit.tuning.memory.planner import (
    MARGIN,
    PARTS,
    Card,
    Forecast,
    card_of,
    forecast_of,
    planned_precision,
)

TRIES = 3  # image sizes that are recorded until one fits
LABELS = {"average": "moving average of the weights", "optimizer": "optimizer state"}


@dataclass(frozen=True)
class Lever:
    """A change of the config and what it does to memory."""

    change: str  # as it is typed
    effect: str  # what else it does
    needed: float  # bytes of the card, margin and context included
    fits: bool  # whether the card has them
    largest: int  # the largest micro-batch that fits then; 0: none


def run(config: DictConfig, bench: Bench) -> Findings:
    """Return what the composed training takes and whether it fits, or a table of several."""
    plan = config.benchmark
    if any(value is not None for value in (plan.models, plan.sizes, plan.tiers)):
        return _comparison(config, bench)
    card = card_of(config)
    working = partial(bench.progress, "recording a step without data", 0, 1)
    forecast = forecast_of(config, card.device_type, working=working)
    batch, peak = int(config.batch_size), forecast.peak(config.batch_size)
    found = [] if peak <= card.budget else list(_levers(config, card, forecast, bench))
    tables = [_parts_table(forecast, batch, card), _batches_table(forecast, batch, card)]
    if found:
        rows = [astuple(replace(lever, needed=lever.needed / GIB)) for lever in found]
        head = columns("change | what it does | needed, GiB:.2f | fits | largest batch then")
        tables.append(Table("levers", f"What would help it into {card.name}", head, rows))
    values: dict[str, Any] = {
        "predicted": True,
        "device_type": card.device_type,
        "precision": planned_precision(config, card.device_type),
        "card_gib": card.gib,
        "context_bytes": card.context,
        "margin": MARGIN,
        "parameters": forecast.parameters,
        "batch": batch,
        "train_bytes": forecast.train.peak(batch),
        "train_parts": forecast.train.at(batch),
        "val_bytes": forecast.val.peak(batch),
        "val_parts": forecast.val.at(batch),
        "needed_bytes": card.needed(peak),
        "fits": peak <= card.budget,
        "largest_batch": card.largest(forecast),
        "levers": [asdict(lever) for lever in found],
    }
    scalars = {
        f"plan/{name}_gib": values[f"{name}_bytes"] / GIB for name in ("train", "val", "needed")
    }
    scalars["plan/largest_batch"] = values["largest_batch"]
    headline = _headline(config, values, card, found)
    return Findings(headline, tables=tables, values=values, scalars=scalars)


def _parts_table(forecast: Forecast, batch: int, card: Card) -> Table:
    sides = forecast.train.at(batch), forecast.val.at(batch)
    totals = [sum(side.values()) for side in sides]
    context = "CUDA context" if card.device_type == "cuda" else "the process itself"
    sizes = [
        *((LABELS.get(part, part), [side.get(part, 0.0) for side in sides]) for part in PARTS),
        ("allocated", totals),
        (f"margin of {MARGIN:.0%}", [total * MARGIN for total in totals]),
        (context, [card.context] * 2),
        (f"needed of {card.name}", [card.needed(total) for total in totals]),
    ]
    rows: list[list[Cell]] = [
        [label, *(size / GIB for size in each)] for label, each in sizes if any(each)
    ]
    head = columns("part | update, GiB:.2f | validation, GiB:.2f")
    val_batch = 1 if forecast.fixed_val else batch
    title = f"At the peak, predicted (batch {batch}, validation {val_batch})"
    return Table("parts", title, head, rows, emphasis=len(rows) - 1)


def _batches_table(forecast: Forecast, batch: int, card: Card) -> Table:
    most = card.largest(forecast)
    powers = [2**exponent for exponent in range(int(math.log2(max(2 * most, batch, 8))) + 1)]
    batches = sorted({*powers, batch, *([most] if most else [])})
    rows: list[list[Cell]] = []
    for size in batches:
        peaks = [forecast.train.peak(size), forecast.val.peak(size)]
        needed = card.needed(max(peaks))
        rows.append([size, *(value / GIB for value in (*peaks, needed)), max(peaks) <= card.budget])
    head = columns("batch | update, GiB:.2f | validation, GiB:.2f | needed, GiB:.2f | fits")
    title = f"By micro-batch, against {card.name}"
    return Table("batches", title, head, rows, emphasis=batches.index(batch))


def _headline(config: DictConfig, values: dict[str, Any], card: Card, found: list[Lever]) -> str:
    sample = schema_of(config.task.name).sample_label(config)
    what = (
        f"{_model_label(config)}, {sample}, {values['precision']}, batch {values['batch']}: needs "
        f"{values['needed_bytes'] / GIB:.2f} GiB of {card.name} (predicted, ±{MARGIN:.0%} and context included)"
    )
    most = values["largest_batch"]
    if values["fits"]:
        return f"{what}: it fits. The largest batch that fits is {most}."
    helps = next((f"Add {lever.change}" for lever in found if lever.fits), "Choose a smaller model")
    rest = f"; the largest batch that fits is {most}" if most else ", nor does a single sample"
    return f"{what}: it does NOT fit{rest}. {helps}."


def _levers(config: DictConfig, card: Card, forecast: Forecast, bench: Bench) -> Iterator[Lever]:
    """Yield what lowers the memory of a config that does not fit, the least costly first."""
    kind = card.device_type
    working = partial(bench.progress, "looking for what helps", 0, 1)

    def lever(options: Mapping[str, Any], effect: str) -> Lever:
        new = changed(config, options)
        then = forecast_of(new, kind, working=working)
        peak, largest = then.peak(new.batch_size), card.largest(then)
        typed = Change("", options).typed
        return Lever(typed, effect, card.needed(peak), peak <= card.budget, largest)

    # Gradients stay alive between micro-batches.
    two = changed(config, {"accumulate": max(config.accumulate, 2)})
    fitting = forecast_of(two, kind, working=working).largest(card.budget)
    largest = int(min(fitting, config.batch_size - 1))
    samples = config.batch_size * config.accumulate
    even = next((size for size in range(largest, 0, -1) if samples % size == 0), 0)
    for batch in range(even, 0, -1):  # a longer window keeps more samples
        options = {"batch_size": batch, "accumulate": math.ceil(samples / batch)}
        smaller = lever(options, f"the effective batch stays {samples}; a little slower")
        if smaller.fits or batch == 1:
            yield smaller
            break
    if kind == "cuda" and planned_precision(config, kind) == "fp32":
        yield lever({"precision": "auto"}, "16-bit products; faster, too")
    if not config.model.get("checkpointing", True):
        effect = "recomputes activations: about 30 % slower"
        yield lever({"model.checkpointing": True}, effect)
    # The largest samples that fit: guessed by their share, then recorded.
    fixed = forecast.peak(0)
    spare = (card.budget - fixed) / max(forecast.peak(config.batch_size) - fixed, 1)
    if spare > 0:
        shrunk = schema_of(config.task.name).smaller_samples(config, spare)
        tried = (lever(*smaller) for smaller in islice(shrunk, TRIES))
        yield from islice((one for one in tried if one.fits), 1)


def _comparison(config: DictConfig, bench: Bench) -> Findings:
    """Return the largest batch that fits of each model and size on each card."""
    tiers = config.benchmark.tiers or []
    cards = [Card("cuda", float(tier)) for tier in tiers] or [card_of(config)]
    variants = list(_variants(config))
    kind, schema = cards[0].device_type, schema_of(config.task.name)
    rows: list[list[Cell]] = []
    for done, variant in enumerate(variants):
        label, shown = _model_label(variant), schema.sample_label(variant)
        working = partial(bench.progress, f"{label}, {shown}", done, len(variants))
        forecast = forecast_of(variant, kind, working=working)
        grows = forecast.peak(16) - forecast.peak(15)
        most = [card.largest(forecast) for card in cards]
        rows.append([label, shown, forecast.peak(1) / GIB, grows / GIB, *most])
    head = columns("model | sample | batch 1, GiB:.2f | each more, GiB:.3f")
    head += [Column(card.name) for card in cards]
    precision = planned_precision(config, kind)
    title = f"Largest micro-batch that fits, {precision}, predicted (0: not a single sample)"
    return Findings(
        headline=f"Largest micro-batches of {len(rows)} settings on {', '.join(card.name for card in cards)}: "
        f"predicted for {precision}, a margin of {MARGIN:.0%} and {cards[0].context / GIB:g} GiB of context left free.",
        tables=[Table("largest", title, head, rows)],
        values={
            "predicted": True,
            "precision": precision,
            "margin": MARGIN,
            "context_bytes": cards[0].context,
        },
    )


def _model_label(config: DictConfig) -> str:
    """Return what the model is called in tables: "segformer b2", "timm_unet resnet34", "cnn"."""
    variant = config.model.get("variant") or config.model.get("encoder") or ""
    checkpointed = ", checkpointing" if config.model.get("checkpointing") else ""
    return f"{config.model.name} {variant}".strip() + checkpointed


def _variants(config: DictConfig) -> Iterator[DictConfig]:
    plan, models = config.benchmark, schema_of(config.task.name).GROUPS["model"]
    for model, size in product(plan.models or [None], plan.sizes or [None]):
        variant = config.copy()
        if model is not None:
            name = "segformer" if model.startswith("b") else model
            if name not in models:
                raise SegFitError(f"benchmark.models={model}: give {', '.join(models)}.")
            if variant.model.name != name:  # else what was composed stays
                variant.model = OmegaConf.structured(models[name])
            if name == "segformer":
                variant.model.variant = model
        if size is not None:
            if "image_size" not in variant:
                raise SegFitError("benchmark.sizes: this task has no image_size to compare.")
            variant.image_size = size
        yield variant
