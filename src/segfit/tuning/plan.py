"""benchmark=plan: will it fit, before anything is downloaded or a card is there? See docs/plan.md."""

from __future__ import annotations

import math

from omegaconf import DictConfig

from segfit.config.tasks import schema_of
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.system.hardware import GIB
from segfit.tuning.bench import Bench
from segfit.tuning.memory.curve import PARTS, Forecast
from segfit.tuning.memory.planner import MARGIN, Card, card_of, forecast_of, planned_precision
from segfit.tuning.plan_levers import Lever, levers
from segfit.tuning.plan_table import compare, is_comparison, model_label

LABELS = {"average": "moving average of the weights", "optimizer": "optimizer state"}


def run(config: DictConfig, bench: Bench) -> Findings:
    """Return what the composed training takes and whether it fits, or a table of several."""
    if is_comparison(config):
        return compare(config, bench)
    card = card_of(config)

    def working() -> None:
        bench.progress("recording a step without data", 0, 1)

    forecast = forecast_of(config, card.device_type, working=working)
    batch = int(config.batch_size)
    fits = forecast.peak(batch) <= card.budget
    found = [] if fits else levers(config, card, forecast, bench.progress)
    tables = [_parts_table(forecast, batch, card), _batches_table(forecast, batch, card)]
    if found:
        tables.append(_levers_table(found, card))
    return Findings(
        headline=_headline(config, forecast, card, found),
        tables=tables,
        values=_values(config, forecast, card, found),
        scalars={
            "plan/train_gib": forecast.train.peak(batch) / GIB,
            "plan/val_gib": forecast.val.peak(forecast.val_batch(batch)) / GIB,
            "plan/needed_gib": card.needed(forecast.peak(batch)) / GIB,
            "plan/largest_batch": card.largest(forecast),
        },
    )


def _parts_table(forecast: Forecast, batch: int, card: Card) -> Table:
    val_batch = forecast.val_batch(batch)
    sides = forecast.train.at(batch), forecast.val.at(val_batch)
    rows: list[list[Cell]] = [
        [LABELS.get(part, part), *(side.get(part, 0.0) / GIB for side in sides)]
        for part in PARTS
        if any(side.get(part) for side in sides)
    ]
    totals = [sum(side.values()) for side in sides]
    context = "CUDA context" if card.device_type == "cuda" else "the process itself"
    rows += [
        ["allocated", *(total / GIB for total in totals)],
        [f"margin of {MARGIN:.0%}", *(total * MARGIN / GIB for total in totals)],
        [context, *[card.context / GIB] * 2],
        [f"needed of {card.name}", *(card.needed(total) / GIB for total in totals)],
    ]
    columns = [Column("part"), Column("update, GiB", ".2f"), Column("validation, GiB", ".2f")]
    title = f"At the peak, predicted (batch {batch}, validation {val_batch})"
    return Table("parts", title, columns, rows, emphasis=len(rows) - 1)


def _batches_table(forecast: Forecast, batch: int, card: Card) -> Table:
    most = card.largest(forecast)
    powers = [2**exponent for exponent in range(int(math.log2(max(2 * most, batch, 8))) + 1)]
    batches = sorted({*powers, batch, *([most] if most else [])})
    rows: list[list[Cell]] = [
        [
            size,
            forecast.train.peak(size) / GIB,
            forecast.val.peak(forecast.val_batch(size)) / GIB,
            card.needed(forecast.peak(size)) / GIB,
            size <= most,
        ]
        for size in batches
    ]
    names = ("update, GiB", "validation, GiB", "needed, GiB")
    columns = [Column("batch"), *(Column(name, ".2f") for name in names), Column("fits")]
    title = f"By micro-batch, against {card.name}"
    return Table("batches", title, columns, rows, emphasis=batches.index(batch))


def _levers_table(found: list[Lever], card: Card) -> Table:
    rows: list[list[Cell]] = [
        [lever.change, lever.effect, lever.needed / GIB, lever.fits, lever.largest]
        for lever in found
    ]
    names = ("change", "what it does", "needed, GiB", "fits", "largest batch then")
    columns = [Column(name, ".2f" if "GiB" in name else "") for name in names]
    return Table("levers", f"What would help it into {card.name}", columns, rows)


def _headline(config: DictConfig, forecast: Forecast, card: Card, found: list[Lever]) -> str:
    batch, most = int(config.batch_size), card.largest(forecast)
    needed = card.needed(forecast.peak(batch)) / GIB
    what = (
        f"{model_label(config)}, {schema_of(config.task.name).sample_label(config)}, {planned_precision(config, card.device_type)}, "
        f"batch {batch}: needs {needed:.2f} GiB of {card.name} (predicted, ±{MARGIN:.0%} and context included)"
    )
    if most >= batch:
        return f"{what}: it fits. The largest batch that fits is {most}."
    helps = next((lever for lever in found if lever.fits), None)
    remedy = f"Add {helps.change}" if helps else "Choose a smaller model"
    if most == 0:
        return f"{what}: it does NOT fit, nor does a single sample. {remedy}."
    return f"{what}: it does NOT fit; the largest batch that fits is {most}. {remedy}."


def _values(
    config: DictConfig, forecast: Forecast, card: Card, found: list[Lever]
) -> dict[str, object]:
    batch = int(config.batch_size)
    val_batch = forecast.val_batch(batch)
    return {
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
        "val_bytes": forecast.val.peak(val_batch),
        "val_parts": forecast.val.at(val_batch),
        "needed_bytes": card.needed(forecast.peak(batch)),
        "fits": forecast.peak(batch) <= card.budget,
        "largest_batch": card.largest(forecast),
        "levers": [vars(lever) for lever in found],
    }
