"""benchmark=segformer: the fast SegFormer against transformers' own, alternating in one process."""

import gc
from itertools import product
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

from segfit.assembly.training import make_training
from segfit.engine.findings import Findings, Table, columns
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.system.hardware import resolve_device
from segfit.tuning import Bench
from segfit.tuning.change import changed
from segfit.tuning.measure import explain_out_of_memory, inference_speed, recorded_peak, train_speed

_PASSES = {"training": train_speed, "inference": inference_speed}
_BRIEFLY: dict[str, Any] = {"seconds": 0.0, "warmup": 0, "resident": True}  # three steps
_SPEED = (
    "model | precision | pass | stock ms:.1f | fast ms:.1f | times faster:.2f | p5:.2f | p95:.2f"
)
_MEMORY = (
    "model | precision | stock peak GiB:.3f | fast peak GiB:.3f | ratio:.2f | of the step alone:.2f"
)


def run(config: DictConfig, bench: Bench) -> Findings:
    """Compare the variants and precisions; raise a SegFitError if the model is no SegFormer, or a step does not fit."""
    mode, model = config.benchmark, config.model
    if model.name != "segformer":
        raise SegFitError(
            f"benchmark=segformer with model={model.name}: it compares SegFormers. "
            "Choose model=segformer_b0 … segformer_b5."
        )
    cases = list(product(mode.variants or [model.variant], mode.precisions or [None]))
    what = f"batch {config.batch_size}, image_size {config.image_size}"
    found, faster, speeds, memory = [], {}, [], []
    for done, (variant, precision) in enumerate(cases):
        bench.progress(f"{variant} {precision or ''}", done, len(cases))
        options = {"model.variant": variant, "model.weights": None, "loader.workers": 0}
        options["precision"] = precision or config.precision.name
        with explain_out_of_memory(config):
            one = compare(changed(config, options), bench)
        found.append({"variant": variant, **one})
        label = variant, one["precision"]
        speeds += [[*label, name, *_ratios(one[name])] for name in _PASSES]
        (stock, fast), state = one["peaks"], one["state"]
        memory.append([*label, stock, fast, fast / stock, (fast - state) / (stock - state)])
        faster["_".join(label)] = _ratios(one["training"])[2]
    ratios = ", ".join(f"{label.replace('_', ' ')} {ratio:.2f}×" for label, ratio in faster.items())
    return Findings(
        headline=f"Training step against transformers with SDPA, {what}: {ratios} faster.",
        tables=[
            Table("speed", f"A step, {what}", columns(_SPEED), speeds),
            Table("memory", "Peak of a training step", columns(_MEMORY), memory),
        ],
        values={"comparisons": found},
        scalars={f"times_faster/{label}": ratio for label, ratio in faster.items()},
    )


def compare(config: DictConfig, bench: Bench) -> dict[str, Any]:
    """Measure one variant in one precision.

    Returns "precision" that ran; "training" and "inference": [stock, fast] lists of milliseconds, one a round; "peaks":
    [stock, fast] GiB allocated by building a training and some updates; "state": GiB of them for parameters and optimizer.
    """
    device, _ = resolve_device(config.device)
    pair, peaks = [], []
    for options in ({"model.fast": False, "channels_last": False}, {"model.fast": True}):
        gc.collect()  # what an earlier case left
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        with recorded_peak(device) as peak:
            pair.append(make_training(changed(config, options), bench.folder, bench.notice))
            # warmed up: cuDNN tries its algorithms with more memory than it takes to use them
            train_speed(pair[-1], **_BRIEFLY | {"warmup": 1})
        peaks.append((peak.bytes - before) / GIB)
    rounds = range(config.benchmark.rounds)
    times = {
        name: np.array([[measure(one, **_BRIEFLY).ms_median for one in pair] for _ in rounds])
        for name, measure in _PASSES.items()
    }
    state = pair[0].fit.state
    kept = [value for one in state.optimizer.state.values() for value in one.values()]
    tensors = [*state.model.parameters(), *state.model.buffers(), *filter(torch.is_tensor, kept)]
    return {
        "precision": state.precision.name,
        **{name: values.T.tolist() for name, values in times.items()},
        "peaks": peaks,
        "state": sum(tensor.nbytes for tensor in tensors) / GIB,
    }


def _ratios(times: list[list[float]]) -> list[float]:
    """Return both medians, their ratio, and its 5th and 95th percentile over rounds."""
    stock, fast = np.median(times, axis=1).tolist()
    spread = np.percentile(np.divide(times[0], times[1]), [5, 95]).tolist()
    return [stock, fast, stock / fast, *spread]
