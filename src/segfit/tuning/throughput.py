"""benchmark=throughput: how fast this composition trains and predicts, with its data and without."""

from dataclasses import asdict
from itertools import product

import torch
from omegaconf import DictConfig

from segfit.assembly.training import make_training
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.tuning.bench import Bench
from segfit.tuning.flops import inference_flops, peak_rate, update_flops
from segfit.tuning.measure import Speed, explain_out_of_memory, inference_speed, train_speed

SECONDS = 10.0
RESIDENT, REAL = "resident", "loaded"
# Inference first: on the CPU peak memory is the process's so far, and training needs more.
_PASSES = {"inference": inference_speed, "training": train_speed}
_COLUMNS = (
    *(Column(name) for name in ("pass", "batches")),
    *(Column(name, ".1f") for name in ("samples/s", "ms", "p5", "p95", "wait %")),
    Column("GiB", ".2f"),
    Column("TFLOP/s", ".3f"),
    Column("peak %", ".0f"),
)


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure training and inference, each on resident batches and its own; raise a SegFitError if a step does not fit."""
    speeds: dict[tuple[str, str], Speed] = {}
    with explain_out_of_memory(config):
        training = make_training(config, bench.folder, bench.notice)
        for done, (name, batches) in enumerate(product(_PASSES, (RESIDENT, REAL))):
            bench.progress(f"{name}, {batches} batches", done, 5)
            speeds[name, batches] = _PASSES[name](
                training,
                seconds=config.seconds or SECONDS,
                warmup=config.benchmark.warmup,
                resident=batches == RESIDENT,
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
    fed = rate / speeds["training", RESIDENT].samples_per_second  # the last is training as it is
    return Findings(
        headline=(
            f"Training: {rate:.1f} samples/s, {speed.ms_median:.1f} ms an update; "
            f"{100 * fed:.0f} % of what a resident batch reaches. "
            f"{teraflops:.3f} TFLOP/s, {100 * share:.0f} % of the {peak:.3f} that "
            f"this {device} does in {state.precision.name} ({source})."
        ),
        tables=[Table("throughput", title, _COLUMNS, rows, emphasis=len(rows) - 1)],
        values={
            "speeds": values,
            "gflops_per_sample": {name: value / 1e9 for name, value in flops.items()},
            "peak": {"teraflops": peak, "source": source},
            "facts": facts,
            "threads": torch.get_num_threads(),
        },
        scalars=scalars,
    )
