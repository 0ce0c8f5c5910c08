"""Part "speed": milliseconds of the device and of the host."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from prove.shared import DEVICE, called, composed, named, read, training
from segfit.engine.step import make_update
from segfit.tuning.measure import first_window, synchronize


def _times(work: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Return median milliseconds: until the device is done, and until the host is."""
    whole, host = [], []
    for _ in range(3 + rounds):
        synchronize(DEVICE)
        start = time.perf_counter()
        work()
        host.append(1000 * (time.perf_counter() - start))
        synchronize(DEVICE)
        whole.append(1000 * (time.perf_counter() - start))
    return {"ms": statistics.median(whole[3:]), "host_ms": statistics.median(host[3:])}


def kernel(*, toy: bool, op: str) -> Any:
    """Time a kernel by itself, forward and backward, at the sizes of b2 at 512 px, batch 8, in half precision."""
    batch, width, side = (1, 8, 16) if toy else (8, 768, 128)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    x = torch.randn(batch, width, side, side, device=DEVICE, dtype=dtype, requires_grad=True)
    small = x.detach()[..., ::4, ::4].contiguous().requires_grad_()
    taps = torch.randn(width, 1, 3, 3, device=DEVICE, dtype=dtype)
    rows = x.flatten(2).transpose(1, 2).detach().requires_grad_()
    heads = rows.detach().unflatten(2, (8, -1)).transpose(1, 2).requires_grad_()
    few = heads.detach()[:, :, ::64].contiguous()
    run: Callable[[], torch.Tensor] = {
        "bilinear": lambda: F.interpolate(small, scale_factor=4, mode="bilinear"),
        "depthwise": lambda: F.conv2d(x, taps, padding=1, groups=width),
        "attention": lambda: F.scaled_dot_product_attention(heads, few, few),
        "layer_norm": lambda: F.layer_norm(rows, (width,)),
    }[op]
    given = torch.ones_like(run())
    return {
        "forward": _times(run, 3 if toy else 20),
        "both": _times(lambda: run().backward(given), 3 if toy else 20),
    }


def step(*, toy: bool, variant: str, batch: int, fast: bool, how: str, precision: str) -> Any:
    """Time updates at 512 px; return the kernels that take most of the device's time, too."""
    config = composed(
        *named(f"segformer_{variant}", toy), f"model.fast={str(fast).lower()}", f"batch_size={batch}",
        f"image_size={64 if toy else 512}", f"precision={precision}", f"compile={str(how != 'eager').lower()}",
        f"compile_mode={how if how == 'reduce-overhead' else 'default'}",
        toy=toy,
    )  # fmt: skip
    fit = training(config).fit
    state, window = fit.state, first_window(fit)
    state.model.train()

    def update() -> None:
        make_update(state, fit.task, window, [0], config.clip_grad_norm)

    found: dict[str, Any] = _times(update, 3 if toy else 15)
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (DEVICE.type == "cuda")]
    with profile(activities=kinds) as record:
        update()
        synchronize(DEVICE)
    key = "device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    events = sorted(record.key_averages(), key=lambda one: -getattr(one, key))[:8]
    found["top"] = [[one.key[:60], one.count, getattr(one, key) / 1000] for one in events]
    return found


def ladder(*, toy: bool) -> Any:
    """Return what benchmark=ladder prints of b0."""
    few = ["seconds=0.2", "benchmark.warmup=1"] if toy else ["seconds=3"]
    model = named("cnn" if toy else "segformer_b0", toy)
    return called("benchmark.py", "benchmark=ladder", *model, *few, toy=toy)[1][-2500:]


def busy(*, toy: bool) -> Any:
    """Return what benchmark=diagnose says of the stock model in fp32, which has to name precision or model.fast."""
    model = named("cnn", toy) if toy else [*named("segformer_b2", toy), "model.fast=false"]
    options = ["precision=fp32", f"seconds={0.5 if toy else 5}"]
    folder, printed = called("benchmark.py", "benchmark=diagnose", *model, *options, toy=toy)
    change = read(folder / "results.json")["values"]["change"] or {}
    named_it = not {"precision", "model.fast"}.isdisjoint(change)
    return {"names": named_it, "change": change, "printed": printed[-2500:]}


def processes(*, toy: bool, count: int, backend: str) -> Any:
    """Train with some processes on one card; return the last lines."""
    options = [*named("cnn", toy), "max_steps=4", "epochs=1"]
    return {
        "wanted": backend,
        "printed": called("train.py", *options, toy=toy, torchrun=count)[1][-400:],
    }
