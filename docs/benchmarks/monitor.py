"""What the monitor costs a training: python docs/benchmarks/monitor.py

Updates of a small network on the CPU (on CUDA where there is a card), in blocks of two seconds, in turn without the
monitor, with it as the trainer uses it (a sample a second), and with fifty samples a second. Speeds of neighbouring
blocks are compared, so that a machine that slows down does not count.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from segfit.system.monitor import Monitor, Probe

INTERVALS = {"no monitor": None, "1 sample/s": 1.0, "50 samples/s": 0.02}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step = make_step(device)
    block(step, options.seconds, None, device)  # warm up
    rounds = [
        {name: block(step, options.seconds, every, device) for name, every in INTERVALS.items()}
        for _ in range(options.rounds)
    ]
    print(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    for name in list(INTERVALS)[1:]:
        slower = [100 * (speeds["no monitor"] / speeds[name] - 1) for speeds in rounds]
        low, median, high = statistics.quantiles(slower, n=4)
        print(f"{name}: {median:+.2f} % time a step (median; quartiles {low:+.2f} to {high:+.2f})")
    spent = cost_of_a_sample(samples=1000)
    print(
        f"a sample by {Probe().source}, its thread's waking up included: {1e3 * spent:.3f} ms of processor time"
    )


def cost_of_a_sample(samples: int) -> float:
    """Return the seconds of processor time that a sample takes while this process does nothing else."""
    start = time.process_time()
    with Monitor(0.005) as monitor:
        while len(monitor.samples) < samples:
            time.sleep(1.0)
        taken = len(monitor.samples)
    return (time.process_time() - start) / taken


def make_step(device: torch.device) -> Callable[[], None]:
    """Return a callable that makes one update."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 4, 1)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    images = torch.randn(2, 3, 128, 128, device=device)

    def step() -> None:
        model(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def block(
    step: Callable[[], None], seconds: float, interval: float | None, device: torch.device
) -> float:
    """Return steps per second."""
    with nullcontext() if interval is None else Monitor(interval):
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            step()
            steps += 1
        if device.type == "cuda":
            torch.cuda.synchronize()
        return steps / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
