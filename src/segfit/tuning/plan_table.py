"""The plan of several models, sizes and cards in one table."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from omegaconf import DictConfig, OmegaConf

from segfit.config.tasks import schema_of
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.errors import SegFitError
from segfit.system.hardware import GIB
from segfit.tuning.bench import Bench
from segfit.tuning.memory.planner import MARGIN, Card, card_of, forecast_of, planned_precision


def is_comparison(config: DictConfig) -> bool:
    """Return whether the plan is about several models, sizes or cards."""
    plan = config.benchmark
    return any(value is not None for value in (plan.models, plan.sizes, plan.tiers))


def compare(config: DictConfig, bench: Bench) -> Findings:
    """Return the largest batch that fits of each model and size on each card."""
    cards = _cards(config)
    variants = list(_variants(config))
    kind = cards[0].device_type
    rows: list[list[Cell]] = []
    for done, variant in enumerate(variants):
        label = model_label(variant)
        shown = schema_of(config.task.name).sample_label(variant)
        what = f"{label}, {shown}"
        forecast = forecast_of(
            variant,
            kind,
            working=lambda what=what, done=done: bench.progress(what, done, len(variants)),  # type: ignore[misc]
        )
        grows = forecast.peak(16) - forecast.peak(15)
        most = [card.largest(forecast) for card in cards]
        rows.append([label, shown, forecast.peak(1) / GIB, grows / GIB, *most])
    columns = [
        Column("model"),
        Column("sample"),
        Column("batch 1, GiB", ".2f"),
        Column("each more, GiB", ".3f"),
        *(Column(card.name) for card in cards),
    ]
    precision = planned_precision(config, kind)
    title = f"Largest micro-batch that fits, {precision}, predicted (0: not a single sample)"
    return Findings(
        headline=f"Largest micro-batches of {len(rows)} settings on {', '.join(card.name for card in cards)}: "
        f"predicted for {precision}, a margin of {MARGIN:.0%} and {cards[0].context / GIB:g} GiB of context left free.",
        tables=[Table("largest", title, columns, rows)],
        values={
            "predicted": True,
            "precision": precision,
            "margin": MARGIN,
            "context_bytes": cards[0].context,
        },
    )


def model_label(config: DictConfig) -> str:
    """Return what the model is called in tables: "segformer b2", "timm_unet resnet34", "cnn"."""
    variant = config.model.get("variant") or config.model.get("encoder") or ""
    checkpointed = ", checkpointing" if config.model.get("checkpointing") else ""
    return f"{config.model.name} {variant}".strip() + checkpointed


def _cards(config: DictConfig) -> list[Card]:
    tiers = config.benchmark.tiers
    return [card_of(config)] if tiers is None else [Card("cuda", float(tier)) for tier in tiers]


def _variants(config: DictConfig) -> Iterator[DictConfig]:
    plan = config.benchmark
    for model, size in product(plan.models or [None], plan.sizes or [None]):
        variant = config.copy()
        if model is not None:
            variant.model = _model(config, model)
        if size is not None:
            if "image_size" not in variant:
                raise SegFitError("benchmark.sizes: this task has no image_size to compare.")
            variant.image_size = size
        yield variant


def _model(config: DictConfig, wanted: str) -> DictConfig:
    """Return the options of a model by its short name; those that were composed stay where they apply."""
    name = "segformer" if wanted.startswith("b") else wanted
    options: DictConfig = config.model.copy()
    if options.name != name:
        options = OmegaConf.structured(schema_of(config.task.name).GROUPS["model"][name])
    if name == "segformer":
        options.variant = wanted
    return options
