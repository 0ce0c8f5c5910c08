"""benchmark=throughput: how fast this composition trains and predicts, with its data and without; and its arithmetic."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any

import torch
from omegaconf import DictConfig
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from segfit.assembly.training import Training, make_training
from segfit.engine.evaluate import evaluate
from segfit.engine.findings import Cell, Findings, Table, columns
from segfit.engine.precision import Precision
from segfit.engine.step import make_update
from segfit.engine.task import count_samples
from segfit.tuning import Bench, measure

SECONDS = 10.0
# Inference first: on the CPU peak memory is the process's so far, and training needs more.
_PASSES = {"inference": measure.inference_speed, "training": measure.train_speed}
_COLUMNS = "pass | batches | samples/s:.1f | ms:.1f | p5:.1f | p95:.1f | wait %:.1f | GiB:.2f | TFLOP/s:.3f | peak %:.0f"
# Name as CUDA gives it, without "NVIDIA" and "GeForce" → dense TFLOP/s in fp32, TF32 and the halves (accumulating in
# fp32), from NVIDIA's data sheets and architecture white papers; None where the card has no such units.
_CARDS: dict[str, tuple[float, float | None, float]] = {
    r"H200|H100 80GB HBM3": (67.0, 494.7, 989.4),
    r"H100 PCIe": (51.2, 378.0, 756.0),
    r"A100-\S+": (19.5, 156.0, 312.0),
    r"A40": (37.4, 74.8, 149.7),
    r"A10": (31.2, 62.5, 125.0),
    r"L40S": (91.6, 183.0, 362.0),
    r"L4": (30.3, 60.0, 121.0),
    r"Tesla V100-SXM2-\S+": (15.7, None, 125.0),
    r"Tesla V100-PCIE-\S+": (14.0, None, 112.0),
    r"Tesla T4": (8.1, None, 65.0),
    r"RTX 4090": (82.6, 82.6, 165.2),
    r"RTX 4080": (48.7, 48.7, 97.5),
    r"RTX 3090": (35.6, 35.6, 71.0),
    r"RTX 3080": (29.8, 29.8, 59.5),
}
_SIDES = {"cpu": 2048, "cuda": 8192}  # of the square matrices whose product measures a peak
_SECONDS = 1.0


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure training and inference, on resident batches and on loaded ones; raise a SegFitError if a step does not fit."""
    speeds: dict[tuple[str, str], measure.Speed] = {}
    with measure.explain_out_of_memory(config):
        training = make_training(config, bench.folder, bench.notice)
        for done, (name, batches) in enumerate(product(_PASSES, ("resident", "loaded"))):
            bench.progress(f"{name}, {batches} batches", done, 5)
            speeds[name, batches] = _PASSES[name](
                training,
                seconds=config.seconds or SECONDS,
                warmup=config.benchmark.warmup,
                resident=batches == "resident",
            )
        bench.progress("arithmetic", 4, 5)
        flops = {"inference": inference_flops(training), "training": update_flops(training)}
    state, facts = training.fit.state, training.facts
    peak, source = peak_rate(state.device, state.precision)
    rows: list[list[Cell]] = []
    values, scalars = [], {}
    for (name, batches), speed in speeds.items():
        rate, teraflops = speed.samples_per_second, flops[name] * speed.samples_per_second / 1e12
        share = teraflops / peak
        times = [speed.ms_median, speed.ms_p5, speed.ms_p95, 100 * speed.data_wait]
        rows.append([name, batches, rate, *times, speed.peak_gib, teraflops, 100 * share])
        extra = {"teraflops": teraflops, "share_of_peak": share}
        values.append({"pass": name, "batches": batches, **asdict(speed), **extra})
        scalars[f"throughput/{name} {batches}"] = rate
    title = f"{facts['model']}, batch {facts['batch']}, {facts['sample']}, {state.precision.name}"
    device = "GPU" if state.device.type == "cuda" else "CPU"
    fed = rate / speeds["training", "resident"].samples_per_second  # the last is training as it is
    return Findings(
        headline=(
            f"Training: {rate:.1f} samples/s, {speed.ms_median:.1f} ms an update; "
            f"{100 * fed:.0f} % of what a resident batch reaches. "
            f"{teraflops:.3f} TFLOP/s, {100 * share:.0f} % of the {peak:.3f} that "
            f"this {device} does in {state.precision.name} ({source})."
        ),
        tables=[Table("throughput", title, columns(_COLUMNS), rows, emphasis=len(rows) - 1)],
        values={
            "speeds": values,
            "gflops_per_sample": {name: value / 1e9 for name, value in flops.items()},
            "peak": {"teraflops": peak, "source": source},
            "facts": facts,
            "threads": torch.get_num_threads(),
        },
        scalars=scalars,
    )


def update_flops(training: Training) -> float:
    """Return the floating-point operations of one update, a sample: forward, backward, augmentation on the device.

    Counted by torch's `FlopCounterMode` on a real update, which changes the weights: products and convolutions, a
    multiply-add as two, element-wise work as none. What activation checkpointing recomputes is counted again.
    """
    fit = training.fit
    state = replace(fit.state, forward=fit.state.model)  # a compiled graph hides its operations
    state.train()
    window = measure.first_window(fit)
    with _counter() as counter:
        make_update(state, fit.task, window, [0] * len(window), fit.options.clip_grad_norm)
    samples = sum(count_samples(batch) for batch in window)
    return float(counter.get_total_flops()) / samples


def inference_flops(training: Training) -> float:
    """Return the floating-point operations of evaluating a held-out sample, as `update_flops` counts them."""
    fit = training.fit
    batch = measure.first_held_out(fit)
    with _counter() as counter:
        evaluate(fit.state.evaluated(), fit.task, [batch], fit.state.precision)
    return float(counter.get_total_flops()) / count_samples(batch)


def peak_rate(device: torch.device, precision: Precision) -> tuple[float, str]:
    """Return the TFLOP/s that the device can do in a precision, and whose figure that is.

    A known card's data sheet, else a large matrix product, measured. Waits for the device.
    """
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        known = data_sheet(torch.cuda.get_device_name(device), precision.name, tf32=tf32)
        if known is not None:
            return known, "data sheet"
    side = _SIDES[device.type]
    a, b = (torch.randn(side, side, device=device).to(precision.dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    best = min(timer.blocked_autorange(min_run_time=_SECONDS).times)
    return 2 * side**3 / best / 1e12, f"a {side} × {side} matrix product, measured"


def data_sheet(name: str, precision: str, *, tf32: bool) -> float | None:
    """Return a CUDA card's dense TFLOP/s by its name, or None for one that is not in the table (laptop parts, MIG).

    `precision` is "fp32", "bf16" or "fp16"; with `tf32`, fp32 products may use TF32.
    """
    bare = re.sub("^(NVIDIA )?(GeForce )?", "", name)
    for pattern, (single, tensor, half) in _CARDS.items():
        if re.fullmatch(pattern, bare):
            return half if precision != "fp32" else (tf32 and tensor) or single
    return None


def _counter() -> FlopCounterMode:
    aten = torch.ops.aten
    mapping: dict[Any, Callable[..., int]] = {
        aten.convolution_backward: convolution_backward_flops,
        torch.ops.mkldnn._linear_pointwise: lambda x, w, *_, **__: 2 * math.prod(x) * w[0],
        aten.mkldnn_rnn_layer: lstm_flops,
        aten._cudnn_rnn: lstm_flops,
        aten.mkldnn_rnn_layer_backward: lambda *args, **_: 2 * lstm_flops(*args),
        aten._cudnn_rnn_backward: lambda *args, **_: 2 * lstm_flops(*args),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)


def lstm_flops(series: Sequence[int], weights: Sequence[Any], *more: Any, **_: Any) -> int:
    """Return the operations of an LSTM's forward pass, from the shapes of its arguments; torch (2.14) counts none.

    cuDNN gets the weights of all layers as a list, oneDNN those of a layer one by one.
    """
    shapes = [weights, more[0]] if isinstance(weights[0], int) else weights
    numbers: int = sum(math.prod(each) for each in shapes if len(each) == 2)
    return 2 * series[0] * series[1] * numbers


def convolution_backward_flops(
    grad_out: Sequence[int], inputs: Sequence[int], weight: Sequence[int], *options: Any, **_: Any
) -> int:
    """Return the operations of a convolution's backward pass: a forward's for each gradient that is asked for.

    torch's own formula (2.15) takes the weight's gradient for that of a dense convolution: for a depthwise one it
    counts as many times too much as there are channels.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, output_mask = options
    forward = conv_flop_count(list(inputs), list(weight), list(grad_out), transposed=transposed)
    return int(forward) * (int(output_mask[0]) + int(output_mask[1]))
