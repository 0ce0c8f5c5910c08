"""Which stages there are: name, seconds at the most, and what it is about."""

import importlib
from collections.abc import Iterator
from itertools import product
from typing import Any

Stage = tuple[str, float, dict[str, Any]]


def of(part: str, toy: bool) -> Iterator[Stage]:
    """Yield the stages of a part in order, the most telling first."""
    yield from {"right": _right, "memory": _memory, "speed": _speed}[part](toy)


def run(part: str, name: str, case: dict[str, Any], toy: bool) -> Any:
    """Run a stage in this process; return what it found, as plain values."""
    return getattr(importlib.import_module(f"prove.{part}"), name)(toy=toy, **case)


def _right(toy: bool) -> Iterator[Stage]:
    models = ["cnn", "timm_unet"] if toy else ["segformer_b0", "segformer_b2", "cnn", "timm_unet"]
    yield "cards", 60, {}
    yield "context", 90, {}
    for model, precision in product(models, ["bf16"] if toy else ["bf16", "fp16"]):
        yield "waits", 60, {"model": model, "precision": precision}
    for model in models:
        yield "exact", 90, {"model": model}
    yield "augmentation", 60, {}
    yield "repeated", 150, {"model": models[0]}
    for model in ["segformer_b0"] if toy else models:
        yield "rounding", 60, {"model": model}
    yield "compiled", 150, {"model": models[0]}
    for precision in ["bf16"] if toy else ["fp32", "bf16", "fp16"]:
        yield "learns", 60, {"precision": precision}


def _memory(toy: bool) -> Iterator[Stage]:
    variants, sizes = (["b0"], [64]) if toy else (["b0", "b2", "b5", "b1", "b3", "b4"], [512, 256])
    precisions = ["fp32"] if toy else ["bf16", "fp32"]
    # Whether all micro-batches of an update are one, and cuDNN tries algorithms.
    ways = [(2, False)] if toy else [(1, True), (2, True), (1, False)]
    cases = list(product(ways, precisions, sizes, variants))
    telling = 1 if toy else 3
    yield from (_predicted(*case) for case in cases[:telling])
    for where in ("forward", "validation", "optimizer", "augmentation"):
        yield "runs_out", 60, {"where": where}
    tiers = {"8gb": 8, "24gb": 24, "4gb": 4, "12gb": 12}
    for tier, gib in list(tiers.items())[: 1 if toy else 4]:
        yield "recipe", 60, {"tier": tier, "gib": gib}
    yield "largest", 150, {}
    # Accumulation and the search are of interest for two variants; everything else is compared for all.
    for case in cases[telling:]:
        (accumulate, search), *_, variant = case
        if (accumulate == 1 and search) or variant in ("b0", "b2"):
            yield _predicted(*case)


def _predicted(way: tuple[int, bool], precision: str, pixels: int, variant: str) -> Stage:
    case = {"variant": variant, "pixels": pixels, "precision": precision, "batches": [2]}
    if pixels > 64:
        case["batches"] = [2, 8, 16]
    return "predicted", 90, {**case, "accumulate": way[0], "search": way[1]}


def _speed(toy: bool) -> Iterator[Stage]:
    batches = [2] if toy else [8, 2, 32]
    hows = ["eager"] if toy else ["eager", "compile", "reduce-overhead"]

    def step(variant: str, fast: bool, how: str, precision: str, batches: list[int]) -> Stage:
        case = {"variant": variant, "fast": fast, "how": how, "precision": precision}
        return "step", 150, {**case, "batches": batches}

    first = "b0" if toy else "b2"
    for fast in (True, False):
        yield step(first, fast, "eager", "bf16", batches)
    for op in ("bilinear", "depthwise", "attention", "layer_norm"):
        yield "kernel", 45, {"op": op}
    yield "busy", 90, {}
    yield "processes", 90, {"count": 1, "backend": "gloo" if toy else "nccl"}
    yield "processes", 90, {"count": 2, "backend": "gloo"}
    yield "ladder", 120, {}
    if toy:
        return
    # Where time is left, in this call or the next: small models and batches gain most by being compiled.
    for how, fast in product(hows[1:], [True, False]):
        yield step("b0", fast, how, "bf16", [2])
    for variant, fast in product(["b0", "b5"], [True, False]):
        yield step(variant, fast, "eager", "bf16", batches)
    for variant, fast in product(["b2", "b0", "b5"], [True, False]):
        yield step(variant, fast, "eager", "fp32", batches)
    for variant, batch, how, fast in product(["b2", "b0", "b5"], batches, hows[1:], [True, False]):
        if (variant, batch) != ("b0", 2):
            yield step(variant, fast, how, "bf16", [batch])
