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
    models = ["cnn"] if toy else ["segformer_b0", "segformer_b2", "cnn", "timm_unet"]
    halves = ["fp32"] if toy else ["bf16", "fp16"]
    yield "cards", 60, {}
    yield "context", 90, {}
    for model, precision in product(models, halves):
        yield "waits", 60, {"model": model, "precision": precision}
    for model in models:
        yield "exact", 90, {"model": model}
    yield "augmentation", 60, {}
    for fast, precision in product([True, False], halves):
        yield "rounding", 60, {"fast": fast, "precision": precision}
    yield "repeated", 150, {"model": models[0]}
    yield "compiled", 150, {"model": models[0]}
    for precision in ["fp32"] if toy else ["fp32", "bf16", "fp16"]:
        yield "learns", 60, {"precision": precision}


def _memory(toy: bool) -> Iterator[Stage]:
    variants = ["b0"] if toy else ["b0", "b1", "b2", "b3", "b4", "b5"]
    for pixels, batch, precision, variant, accumulate, search in product(
        [64] if toy else [256, 512],
        [2] if toy else [2, 8, 16],
        ["fp32"] if toy else ["bf16", "fp32"],
        variants,
        [1] if toy else [1, 2],
        [True] if toy else [True, False],
    ):
        plain = search and accumulate == 1
        if plain or (pixels == 256 and batch == 8 and precision == "bf16"):
            case = {"variant": variant, "pixels": pixels, "batch": batch, "precision": precision}
            yield "predicted", 45, {**case, "accumulate": accumulate, "search": search}
    tiers = {"4gb": 4, "8gb": 8, "12gb": 12, "24gb": 24}
    for tier, gib in list(tiers.items())[: 1 if toy else 4]:
        yield "recipe", 60, {"tier": tier, "gib": gib}
    for where in ["forward"] if toy else ["augmentation", "forward", "optimizer", "validation"]:
        yield "runs_out", 60, {"where": where}
    yield "largest", 150, {}


def _speed(toy: bool) -> Iterator[Stage]:
    for op in ("bilinear", "depthwise", "attention", "layer_norm"):
        yield "kernel", 45, {"op": op}
    for variant, batch, fast, how, precision in product(
        ["b0"] if toy else ["b0", "b2", "b5"],
        [2] if toy else [8, 2, 32],
        [True, False],
        ["eager"] if toy else ["eager", "compile", "reduce-overhead"],
        ["fp32"] if toy else ["bf16", "fp32"],
    ):
        if how == "eager" or (variant != "b5" and batch < 32 and precision == "bf16"):
            case = {"variant": variant, "batch": batch, "fast": fast}
            yield "step", 90, {**case, "how": how, "precision": precision}
    yield "ladder", 120, {}
    yield "busy", 90, {}
    yield "processes", 60, {"count": 1, "backend": "nccl"}
    yield "processes", 60, {"count": 2, "backend": "gloo"}
