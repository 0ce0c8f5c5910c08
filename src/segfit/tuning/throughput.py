"""benchmark=throughput: how fast this composition trains and predicts, with its data and without."""

from collections.abc import Callable
from dataclasses import asdict

import torch
from omegaconf import DictConfig

from segfit.assembly.training import Training, make_training
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.tuning.bench import Bench
from segfit.tuning.flops import PeakRate, inference_flops, peak_rate, update_flops
from segfit.tuning.measure import Speed, explain_out_of_memory, inference_speed, train_speed

SECONDS = 10.0
RESIDENT, REAL = "resident", "loaded"

# Inference first: on the CPU peak memory is the process's so far, and training needs more.
_MEASUREMENTS: tuple[tuple[str, Callable[..., Speed], bool], ...] = (
    ("inference", inference_speed, True),
    ("inference", inference_speed, False),
    ("training", train_speed, True),
    ("training", train_speed, False),
)
_COLUMNS = (
    *(Column(name) for name in ("pass", "batches")),
    *(Column(name, ".1f") for name in ("samples/s", "ms", "p5", "p95", "wait %")),
    Column("GiB", ".2f"),
    Column("TFLOP/s", ".3f"),
    Column("peak %", ".0f"),
)


def run(config: DictConfig, bench: Bench) -> Findings:
    """Measure training and inference of a composition, each on resident batches and on its own.

    Raises:
        SegFitError: if a step does not fit into memory.
    """
    total = len(_MEASUREMENTS) + 1
    with explain_out_of_memory(config):
        training = make_training(config, bench.folder, bench.notice)
        speeds: dict[tuple[str, str], Speed] = {}
        for done, (name, measure, resident) in enumerate(_MEASUREMENTS):
            batches = RESIDENT if resident else REAL
            bench.progress(f"{name}, {batches} batches", done, total)
            speeds[name, batches] = measure(
                training,
                seconds=config.seconds or SECONDS,
                warmup=config.benchmark.warmup,
                resident=resident,
            )
        bench.progress("arithmetic", total - 1, total)
        flops = {"inference": inference_flops(training), "training": update_flops(training)}
    most = peak_rate(training.fit.state.device, training.fit.state.precision)
    return _findings(training, speeds, flops, most)


def _findings(
    training: Training,
    speeds: dict[tuple[str, str], Speed],
    flops: dict[str, float],
    most: PeakRate,
) -> Findings:
    state = training.fit.state
    device = "GPU" if state.device.type == "cuda" else "CPU"
    rows: list[list[Cell]] = []
    values, scalars = [], {}
    for (name, batches), speed in speeds.items():
        teraflops = flops[name] * speed.samples_per_second / 1e12
        share = teraflops / most.teraflops
        times = [speed.ms_median, speed.ms_p5, speed.ms_p95]
        rest = [100 * speed.data_wait, speed.peak_gib, teraflops, 100 * share]
        rows.append([name, batches, speed.samples_per_second, *times, *rest])
        extra = {"teraflops": teraflops, "share_of_peak": share}
        values.append({"pass": name, "batches": batches, **asdict(speed), **extra})
        scalars[f"throughput/{name} {batches}"] = speed.samples_per_second
    table = Table(
        "throughput",
        f"{training.facts['model']}, batch {training.facts['batch']}, {training.facts['sample']}, "
        f"{state.precision.name}",
        _COLUMNS,
        rows,
        emphasis=len(rows) - 1,
    )
    real, resident = speeds["training", REAL], speeds["training", RESIDENT]
    teraflops = flops["training"] * real.samples_per_second / 1e12
    return Findings(
        headline=(
            f"Training: {real.samples_per_second:.1f} samples/s, {real.ms_median:.1f} ms an update; "
            f"{100 * real.samples_per_second / resident.samples_per_second:.0f} % of what a resident batch reaches. "
            f"{teraflops:.3f} TFLOP/s, {100 * teraflops / most.teraflops:.0f} % of the {most.teraflops:.3f} that "
            f"this {device} does in {state.precision.name} ({most.source})."
        ),
        tables=[table],
        values={
            "speeds": values,
            "gflops_per_sample": {name: value / 1e9 for name, value in flops.items()},
            "peak": asdict(most),
            "facts": training.facts,
            "threads": torch.get_num_threads(),
        },
        scalars=scalars,
    )
