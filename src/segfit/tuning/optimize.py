"""benchmark=optimize: one command that turns a machine into a setting, conf/hardware/local.yaml. See docs/optimize.md."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.task import TRAINED, assembly_of
from segfit.assembly.tuned import model_choice, model_options, tuned_for
from segfit.config.check import plain
from segfit.config.tasks import DEFAULT, config_folders, qualified, schema_of
from segfit.engine.findings import Cell, Findings, Table, columns
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.system.files import replace_text, reporting
from segfit.tuning import Bench
from segfit.tuning.change import GROUPS, Change
from segfit.tuning.climb import SPEED_COLUMNS, Climb, Step, bars
from segfit.tuning.search import Search

CONF = Path(__file__).parents[3] / "conf"
MARK = "Written by benchmark=optimize"
# What a recipe says at the top level, in the order of conf/hardware/*.yaml.
_TOP = ("batch_size", "accumulate", "epochs", "lr", "channels_last", "compile")
_COLUMNS = f"setting | samples/s:.1f | × composed:.2f | verdict | {SPEED_COLUMNS}"


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure the settings that matter, keep what is faster, let the model grow if asked, write the recipe.

    Raise a SegFitError if not even one sample trains here, or the recipe cannot be written.
    """
    options, task = config.benchmark, config.task.name
    deadline = time.monotonic() + 60 * options.budget_minutes
    usual = CONF / "hardware" / ("" if task == DEFAULT else task) / "local.yaml"
    out = Path(options.out or usual)
    _refuse_unwritable(out)
    sources = assembly_of(config).make_sources(config)
    for line in assembly_of(config).check_sources(config, sources, TRAINED).notices:
        bench.notice(line)
    climb = Search(config, bench, sources, deadline)
    fitting = climb.run()
    before, after = climb.compare()
    if before is not None and after is not None and after < before:
        climb.kept, after = {}, before  # what seemed faster was chance
    fastest = after if after is not None else climb.best
    best = climb.config()
    values: dict[str, Any] = {
        "changes": Change("result", climb.kept).typed,
        "composed": before,
        "fastest": fastest,
        "gain": fastest and before and fastest / before,
        "composed_batch": int(config.batch_size * config.accumulate),
        "effective": int(best.batch_size * best.accumulate),
        "fitting": fitting,
        "grown": None,
        "out": str(out),
    }
    summary = _summary(values)
    reference = before or fastest
    if options.grow and reference is not None:
        grown = climb.grow(options.min_speed * reference)
        values["grown"] = climb.best if grown else None
        summary.append(_growth(climb, grown, reference, options.min_speed))
        best = climb.config()
    values["tuned_for"] = tuned_for(best, climb.device)
    vram = None
    if climb.device.type == "cuda":
        vram = round(torch.cuda.get_device_properties(climb.device).total_memory / GIB, 1)
    date = datetime.now().astimezone().isoformat(sep=" ", timespec="minutes")
    header = [f"{date}, data={config.data.name} {config.data.get('root') or ''}".strip(), *summary]
    hardware = {"name": "local", "vram_gb": vram, "tuned_for": values["tuned_for"]}
    with reporting(f"benchmark.out={out}"):
        replace_text(out, _recipe(best, climb.kept, hardware, header))
    use = f"python train.py task={task} hardware=local"
    summary.append(f"Written to {out}" if options.out else f"Written to {out}. Use it: {use}")
    facts = next((step.facts for step in climb.steps if step.facts), {})
    title = f"{facts.get('model', config.model.name)}, {facts.get('sample', '')}"
    composed = climb.steps[0].rate
    rows: list[list[Cell]] = []
    labels = []
    for step in climb.steps:
        gain = step.rate and composed and step.rate / composed
        rows.append([step.change.name, step.rate, gain, step.verdict, *step.cells()])
        labels.append(step.verdict if step.rate is None else f"{step.rate:.1f}  {step.verdict}")
    figure = partial(bars, climb.steps, labels, f"{title}\n{values['tuned_for']['device']}")
    about = f"{title}: each on top of those that were kept above it"
    return Findings(
        headline="\n".join(summary),
        tables=[Table("trials", about, columns(_COLUMNS), rows)],
        values={**values, "trials": [asdict(step) for step in climb.steps]},
        figures={"optimize": figure},
        scalars={
            "optimize/samples_per_second": values["fastest"] or 0.0,
            "optimize/gain": values["gain"],
            "optimize/grown_samples_per_second": values["grown"],
        },
    )


def _summary(values: dict[str, Any]) -> list[str]:
    """Return what was measured, and what it does to the effective batch, a line each."""
    rate, changes, gain = values["fastest"], values["changes"], values["gain"]
    now = "not measured to the end" if rate is None else f"{rate:.1f} samples/s"
    lines = ["Nothing was found that is faster than the composed recipe."]
    if changes and gain is None:
        lines = [f"The composed recipe does not fit, or was not measured; {now} with {changes}"]
    elif changes:
        as_fast = f"{gain:.2f} times as fast as the composed recipe"
        lines = [f"{as_fast}: {values['composed']:.1f} → {now} with {changes}"]
    if values["effective"] != values["composed_batch"]:
        lines.append(
            f"The effective batch is {values['effective']}, no longer {values['composed_batch']}; lr is as it was: "
            f"benchmark=lr_find says which goes with it."
        )
    return lines


def _growth(climb: Climb, grown: Sequence[Step], reference: float, least: float) -> str:
    """Return a line that says what grew, and what that costs of `reference` samples per second."""
    if not grown:
        return f"Nothing grew: what is larger does not fit, trains at less than {least:g} times {reference:.1f} samples/s, or there was no time."
    options = {key: climb.kept[key] for step in grown for key in step.change.options}
    first = next(step for step in climb.steps if step.facts)
    then, now = (f"{step.facts['model']}, {step.facts['sample']}" for step in (first, grown[-1]))
    rate = climb.best or 0.0
    return (
        f"Grown to {Change('', options).typed}: {now} in place of {then}, at {rate:.1f} samples/s, "
        f"{rate / reference:.2f} times {reference:.1f}."
    )


def _refuse_unwritable(path: Path) -> None:
    """Raise a SegFitError if `path` cannot be written, or is a file that benchmark=optimize did not write."""
    with reporting(f"benchmark.out={path}"):
        if path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
            raise SegFitError(
                f"benchmark.out={path}: benchmark=optimize did not write it. Rename it, or give "
                f"another benchmark.out."
            )
    if not os.access(path.parent, os.W_OK):
        raise SegFitError(
            f"benchmark.out={path}: the folder {path.parent} is not there, or cannot be written to."
        )


def _recipe(
    config: DictConfig, kept: Mapping[str, Any], hardware: Mapping[str, Any], header: Sequence[str]
) -> str:
    """Return the text of a hardware file that composes to `config`, as far as a recipe goes; `header`: figures, a line each.

    `kept` are the options of `config` that are not as they were composed.
    """
    task = config.task.name
    groups = {"model": model_choice(config)} | {
        name: str(config[name].name) for name in (*GROUPS, "scheduler") if name in config
    }
    typed = [f"{name}={choice}" for name, choice in groups.items()]
    choices = qualified(typed, task, config_folders(sys.argv[1:], CONF))
    defaults = [
        {f"override /{name}@_global_.{name}": text.partition("=")[2]}
        for name, text in zip(groups, choices, strict=True)
    ]
    sample, _ = next(schema_of(task).smaller_samples(config, 2.0), ({}, ""))
    model = {**model_options(config)}
    if config.model.get("checkpointing"):
        model["checkpointing"] = True
    keys = [*(key for key in _TOP if key in config), "loader.workers", "data.cache", *sample]
    keys += [f"model.{key}" for key in model] + [key for key in kept if key not in groups]
    values = OmegaConf.create({"hardware": hardware})
    for key in keys:
        OmegaConf.update(values, key, OmegaConf.select(config, key))
    everything = {"defaults": defaults, **plain(values)}
    body = yaml.safe_dump(everything, sort_keys=False, allow_unicode=True, width=110)
    command = f"python train.py task={task} hardware=local"
    top = ("@package _global_", command, f"{MARK}; it will do so again.")
    return "\n".join([*(f"# {line}" for line in (*top, *header)), body])
