"""Plans what models need on a card, and writes it where training reads it when it starts: src/segfit/system/cards.json.

    PYTHONPATH=. python docs/benchmarks/cards.py                            # all of it: some minutes
    PYTHONPATH=. python docs/benchmarks/cards.py segmentation segformer_b2  # one model; the others stay

To be run again where benchmark=plan gives other figures (tests/integration/test_plan.py notices). The figures are in
GiB, margin and context of the plan included: a training takes `fixed` and, for each sample of a micro-batch, `each` times the
numbers that the model gets of it. With accumulation come `gradients` once, and `waiting` times those numbers for each sample
of the other micro-batches.
"""

import json
import math
import sys
from importlib import metadata
from pathlib import Path

import torch

from segfit.assembly.task import assembly_of
from segfit.assembly.tuned import model_label
from segfit.system.cards import GIB
from segfit.tuning.change import changed
from segfit.tuning.memory.planner import CONTEXT, MARGIN, forecast_of
from tests.unit.composing import composed

OUT = Path(__file__).parents[2] / "src/segfit/system/cards.json"
SEGMENTATION = [f"segformer_b{size}" for size in range(6)] + ["cnn", "timm_unet"]
# What "also fits" is about: the numbers of a sample, and what it is called.
FILLING = {"segmentation": [3 * 512**2, "512 px"], "restoration": [3 * 256**2, "patches of 256 px"]}
TIERS = ("4gb", "8gb", "12gb", "24gb")
BATCHES = 4, 16  # of the line


def main(task: str = "", model: str = "") -> None:
    """Plan everything, or a task, or a model of it."""
    rows = [("segmentation", f"model={name}", "hardware=8gb") for name in SEGMENTATION]
    rows += [
        (task, f"hardware={tier}") for task in ("restoration", "forecasting") for tier in TIERS
    ]
    table = json.loads(OUT.read_text()) if OUT.exists() else {"models": {}, "recipes": {}}
    table["versions"] = {name: metadata.version(name) for name in ("torch", "transformers", "timm")}
    for name in ("segmentation", "restoration", "forecasting"):
        recipes = {tier: of_recipe(composed(f"task={name}", f"hardware={tier}")) for tier in TIERS}
        table["recipes"][name] = recipes
    table["filling"] = FILLING
    for name, *options in rows:
        if task in ("", name) and model in ("", options[0].partition("=")[2]):
            config = composed(f"task={name}", *options)
            table["models"].setdefault(name, {})[model_label(config)] = needs(config)
            print(name, model_label(config), table["models"][name][model_label(config)], flush=True)
            OUT.write_text(as_text(table), encoding="utf-8")


def numbers(config) -> int:
    """Return how many numbers the model gets of a sample."""
    return math.prod(assembly_of(config).example_input(config, 1, torch.device("cpu")).shape)


def of_recipe(config) -> list:
    """Return the model of a recipe, and the numbers of a sample."""
    return [model_label(config), numbers(config)]


def needs(config) -> dict[str, float]:
    """Return what a model needs of a card."""
    forecast = forecast_of(changed(config, {"accumulate": 1}), "cuda")
    low, high = (forecast.peak(batch) * (1 + MARGIN) / GIB for batch in BATCHES)
    each = (high - low) / (BATCHES[1] - BATCHES[0])
    waiting = forecast.waiting[1] * (1 + MARGIN) / GIB
    found = {
        "fixed": low - BATCHES[0] * each + CONTEXT / GIB,
        "each": each / numbers(config),
        "gradients": forecast.parameters * 4 * (1 + MARGIN) / GIB,
        "waiting": waiting / numbers(config),
    }
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def as_text(table: dict) -> str:
    """Return the table as JSON, a model a line."""
    lines = ["{", *(f' "{part}": {json.dumps(table[part])},' for part in ("versions", "filling"))]
    for part, last in (("recipes", ","), ("models", "")):
        tasks = []
        for task, values in table[part].items():
            inner = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items())
            tasks.append(f"  {json.dumps(task)}: {{\n{inner}\n  }}")
        lines.append(f' "{part}": {{\n' + ",\n".join(tasks) + f"\n }}{last}")
    return "\n".join([*lines, "}"]) + "\n"


if __name__ == "__main__":
    main(*sys.argv[1:])
