"""What it costs that processes train one model together.

    torchrun --standalone --nproc_per_node=2 docs/benchmarks/scaling.py [model=… batch_size=… …]

The same processes make, block by block in turn, the updates of train.py

    together  as one training: gradients, counts and losses are added up
    apart     each by itself, all at once: what the machine gives to so many processes, who share its memory
    alone     the first one, while the others sleep

Speeds of neighbouring blocks are compared, so that a machine that slows down does not count.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from segfit.assembly.training import Training, make_training
from segfit.cli import main as cli
from segfit.config.check import check
from segfit.engine.distributed import SINGLE_PROCESS, Distributed, joined
from segfit.engine.step import make_update
from segfit.system.hardware import device_name

ROUNDS = 12
BLOCK_SECONDS = 2.0
DEFAULTS = {
    "model": "segformer_b0",
    "batch_size": "2",
    "image_size": "256",
    "data": "shapes",
    "data.train_size": "64",
    "augmentation": "none",
    "precision": "fp32",
    "loader.workers": "0",
}
KINDS = ("together", "apart", "alone")


def main() -> None:
    """Measure and print."""
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    overrides = [f"{key}={value}" for key, value in {**DEFAULTS, **given}.items()]
    config = composed(overrides)
    with joined(config.device) as distributed, tempfile.TemporaryDirectory() as folder:
        training = make_training(config, Path(folder), print, distributed=distributed)
        update = make_block(training, config)
        count = blocks_of(update, distributed)
        rounds = [
            {kind: block(kind, update, count, distributed) for kind in KINDS} for _ in range(ROUNDS)
        ]
        if not distributed.is_main:
            return
        state = training.fit.state
        images = config.batch_size * config.accumulate * count
        threads = torch.get_num_threads()
        print(
            f"torch {torch.__version__}, {device_name(state.device)}, {threads} thread(s) a process"
        )
        print(
            f"{' '.join(overrides)}, {distributed.size} processes, {ROUNDS} rounds of {count} updates"
        )
        for kind in KINDS:
            factor = 1 if kind == "alone" else distributed.size
            speed = statistics.median(factor * images / one[kind] for one in rounds)
            print(f"{kind:9}{speed:8.2f} images/s")
        show(
            "together / alone",
            [distributed.size * one["alone"] / one["together"] for one in rounds],
        )
        show("apart / alone", [distributed.size * one["alone"] / one["apart"] for one in rounds])
        show("together / apart", [one["apart"] / one["together"] for one in rounds])


def composed(overrides: list[str]) -> DictConfig:
    """Return the checked config of train.py."""
    cli.setup()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        config = compose("train", overrides)
    check(config)
    return config


def make_block(training: Training, config: DictConfig) -> Callable[[int, Distributed], None]:
    """Return a callable that makes updates on resident batches, by one process or several."""
    fit = training.fit
    batches = iter(fit.train.epoch(0, 0))
    window = [next(batches) for _ in range(config.accumulate)]
    state, together = fit.state, fit.state.forward
    alone = state.distributed.unwrap(together)  # compiled too, where compile=true compiled it
    seeds = list(range(len(window)))

    def updates(count: int, distributed: Distributed) -> None:
        state.distributed, state.forward = (
            distributed,
            alone if distributed is SINGLE_PROCESS else together,
        )
        for _ in range(count):
            make_update(state, fit.task, window, seeds, config.clip_grad_norm)
            distributed.max(0, 0)  # whether to stop or to save, as the loop asks after every update
        if state.device.type == "cuda":
            torch.cuda.synchronize()

    return updates


def blocks_of(update: Callable[[int, Distributed], None], distributed: Distributed) -> int:
    """Warm up, also by itself; return how many updates take about `BLOCK_SECONDS`."""
    update(3, SINGLE_PROCESS)
    update(3, distributed)
    start = time.perf_counter()
    update(3, distributed)
    own = 3 * BLOCK_SECONDS / (time.perf_counter() - start)
    return max(1, *distributed.max(round(own)))


def block(
    kind: str, update: Callable[[int, Distributed], None], count: int, distributed: Distributed
) -> float:
    """Return the seconds that a block took until the last process was done."""
    distributed.gather(None)
    start = time.perf_counter()
    if kind == "together":
        update(count, distributed)
    elif kind == "apart" or distributed.is_main:
        update(count, SINGLE_PROCESS)
    distributed.gather(None)
    return time.perf_counter() - start


def show(what: str, ratios: list[float]) -> None:
    """Print a ratio."""
    low, median, high = statistics.quantiles(ratios, n=4)
    print(f"{what}: {median:.3f} (median; quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
