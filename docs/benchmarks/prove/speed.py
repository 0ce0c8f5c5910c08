"""Part "speed": milliseconds of the device and of the host."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from prove.shared import DEVICE, called, composed, named, read, training
from segfit.engine.checkpoint import load_checkpoint
from segfit.engine.out_of_memory import is_out_of_memory, release_memory
from segfit.engine.step import make_update
from segfit.system.monitor import Monitor
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


def step(
    *, toy: bool, variant: str, fast: bool, how: str, precision: str, batches: list[int]
) -> Any:
    """Time updates at 512 px with each batch; return the kernels that take most of the device's time, too."""
    found: dict[str, Any] = {}
    for batch in batches:
        config = composed(
            *named(f"segformer_{variant}", toy), f"model.fast={str(fast).lower()}", f"batch_size={batch}",
            f"image_size={64 if toy else 512}", f"precision={precision}", f"compile={str(how != 'eager').lower()}",
            f"compile_mode={how if how == 'reduce-overhead' else 'default'}", f"data.train_size={batch}",
            toy=toy,
        )  # fmt: skip
        try:
            found[str(batch)] = _updates(config, 3 if toy else 15)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            found[str(batch)] = {"ms": None, "why": "out of memory"}
        release_memory()
    return found


def _updates(config: DictConfig, rounds: int) -> dict[str, Any]:
    made = training(config)
    state, task, window = made.fit.state, made.fit.task, first_window(made.fit)
    state.model.train()

    def update() -> None:
        make_update(state, task, window, [0], config.clip_grad_norm)

    found: dict[str, Any] = _times(update, rounds)
    found |= {key: made.facts[key] for key in ("precision", "compiled")}
    cuda = DEVICE.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as record:
        update()
        synchronize(DEVICE)
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    kind = (
        DeviceType.CUDA if cuda else DeviceType.CPU
    )  # kernels, not the operations that launch them
    events = [
        one
        for one in record.key_averages()
        if one.device_type == kind and not getattr(one, "is_user_annotation", False)
    ]
    events.sort(key=lambda one: -getattr(one, key))
    found["kernels"] = sum(one.count for one in events)
    found["top"] = [[one.key[:60], one.count, getattr(one, key) / 1000] for one in events[:8]]
    return found


def ladder(*, toy: bool) -> Any:
    """Return what benchmark=ladder prints of b0."""
    few = ["seconds=0.2", "benchmark.warmup=1"] if toy else ["seconds=3"]
    model = named("cnn" if toy else "segformer_b0", toy)
    return called("benchmark.py", "benchmark=ladder", *model, *few, toy=toy)[1][-2500:]


def busy(*, toy: bool) -> Any:
    """Return what benchmark=diagnose says of the stock model in fp32, which has to name precision or model.fast.

    And how busy the device was meanwhile, in percent: the median of the busier half of the readings, as processes start, too.
    """
    model = named("cnn", toy) if toy else [*named("segformer_b2", toy), "model.fast=false"]
    options = ["precision=fp32", f"seconds={0.5 if toy else 5}"]
    with Monitor(0.2) as monitor:
        folder, printed = called("benchmark.py", "benchmark=diagnose", *model, *options, toy=toy)
    change = read(folder / "results.json")["values"]["change"] or {}
    named_it = not {"precision", "model.fast"}.isdisjoint(change)
    readings = sorted(one.utilisation for one in monitor.samples if one.utilisation is not None)
    found = {"names": named_it, "change": change, "read_by": monitor.probe.source}
    found["utilisation"] = readings[len(readings) * 3 // 4] if readings else None
    return {**found, "printed": printed[-2500:]}


def processes(*, toy: bool, count: int, backend: str) -> Any:
    """Train with processes on one card; return how far the weights are from those that one makes without a group."""
    options = [
        *named("cnn", toy), "model.dropout=0", "precision=fp32", "precision.tf32=false", "deterministic=true",
        "optimizer=sgd", "lr=0.05", "batch_size=2", "data.train_size=16", "data.val_size=2", "epochs=2", "max_steps=4",
    ]  # fmt: skip
    script = f"docs/benchmarks/prove/joined.py {backend}"
    run, printed = called(script, *options, toy=toy, torchrun=count)
    alone, _ = called("train.py", *options, f"accumulate={count}", toy=toy)
    several, one = (
        load_checkpoint(folder / "checkpoints" / "last.pt")["model"] for folder in (run, alone)
    )
    weights = [name for name in one if "running" not in name and "num_batches" not in name]
    far = sum(float((several[name] - one[name]).double().square().sum()) for name in weights)
    size = sum(float(one[name].double().square().sum()) for name in weights)
    line = next(line for line in reversed(printed.splitlines()) if "joined by" in line)
    return {"joined": line, "difference": (far / size) ** 0.5}
