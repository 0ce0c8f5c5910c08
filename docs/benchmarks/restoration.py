"""Train one network by SegFit and by a plain loop, a few steps each in turns, within one process.

    python docs/benchmarks/restoration.py --root ../shared/data/denoise/train400 [--rounds 9] [override …]

Overrides are those of train.py; the default is experiment=denoise. The plain loop is written here, in the way of toolboxes
such as BasicSR and KAIR: fp32, channels first, workers that decode a picture for each patch, crop it, turn it and add the
noise, L1, Adam, a moving average of the weights kept tensor by tensor. SegFit trains by L1 and AdamW too, whatever the
experiment says; batch, patch, network, average and clipping are SegFit's. A step lasts until the next begins, its wait for
data included.

Prints milliseconds a step: median and quartiles over rounds, and the ratio within each round.
"""

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from statistics import quantiles
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from segfit.assembly.training import make_training
from segfit.cli import main as cli
from segfit.config.check import check, plain
from segfit.engine.step import make_update
from segfit.models.restorers import make_restorer

WARM = 2  # steps of each turn that are not counted


class Patches(Dataset[dict[str, Tensor]]):
    """A clean patch of each picture, and the same with noise.

    Args:
        files: the pictures.
        config: of SegFit's training.
    """

    def __init__(self, files: Sequence[Path], config: DictConfig) -> None:
        self.files = files
        self.mode = "L" if config.data.image_mode == "gray" else "RGB"
        self.side = config.patch_size
        self.sigma = float(config.degrade.sigma) / 255

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with Image.open(self.files[index]) as image:
            pixels = np.asarray(image.convert(self.mode))
        height, width = pixels.shape[:2]
        top, left = (
            np.random.randint(height - self.side + 1),
            np.random.randint(width - self.side + 1),
        )
        patch = np.rot90(
            pixels[top : top + self.side, left : left + self.side], np.random.randint(4)
        )
        patch = patch[:, ::-1] if np.random.randint(2) else patch
        patch = patch[..., None] if patch.ndim == 2 else patch
        clean = torch.from_numpy(np.ascontiguousarray(patch.transpose(2, 0, 1))).float() / 255
        return {"lq": clean + torch.randn_like(clean) * self.sigma, "gt": clean}


def plain_loop(config: DictConfig, device: torch.device, workers: int) -> Iterator[None]:
    """Yield after each step."""
    files = sorted(path for path in Path(config.data.root).rglob("*") if path.is_file())
    patches = Patches(files, config)
    loader = DataLoader(
        patches,
        batch_size=config.batch_size * config.accumulate,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    network = make_restorer(1 if patches.mode == "L" else 3, plain(config.model)).to(device)
    average = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.lr)
    while True:
        for batch in loader:
            optimizer.zero_grad()
            restored = network(batch["lq"].to(device, non_blocking=True))
            loss = F.l1_loss(restored, batch["gt"].to(device, non_blocking=True))
            loss.backward()
            if config.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip_grad_norm)
            optimizer.step()
            if config.ema_decay is not None:
                for kept, new in zip(average.parameters(), network.parameters(), strict=True):
                    kept.data.mul_(config.ema_decay).add_(new.data, alpha=1 - config.ema_decay)
            yield


def our_loop(fit: Any) -> Iterator[None]:
    """Yield after each step of SegFit's training."""
    fit.state.model.train()
    window: list[Any] = []
    for epoch in count():
        for batch in fit.train.epoch(epoch, 0):
            window.append(batch)
            if len(window) == fit.options.accumulate:
                seeds = list(range(len(window)))
                make_update(fit.state, fit.task, window, seeds, fit.options.clip_grad_norm)
                window = []
                yield


def turn(loop: Iterator[None], steps: int, device: torch.device) -> float:
    """Return the seconds that a step takes."""
    for _ in range(WARM):
        next(loop)
    synchronise(device)
    start = time.perf_counter()
    for _ in range(steps):
        next(loop)
    synchronise(device)
    return (time.perf_counter() - start) / steps


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def composed(overrides: Sequence[str]) -> DictConfig:
    """Return the config that train.py would compose."""
    sys.argv[1:] = overrides
    cli.setup()  # turns choices into those of the task
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        config = compose("train", sys.argv[1:])
    check(config)
    return config


def summary(values: Sequence[float], unit: str = "") -> str:
    """Return median and quartiles."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return f"{middle:.2f}{unit} ({low:.2f}–{high:.2f})"


def main(arguments: Sequence[str]) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--root", required=True, help="folder of clean pictures")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20, help="counted steps of a turn")
    parser.add_argument("--workers", type=int, default=2, help="of the plain loop")
    options, overrides = parser.parse_known_args(arguments)
    config = composed(
        [
            *(overrides or ["experiment=denoise"]),
            "data=folder",
            f"data.root={options.root}",
            "data.check=off",
            "optimizer=adamw",
            "loss=l1",
            "scheduler=none",
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        training = make_training(config, Path(folder), print)
        fit = training.fit
        device = fit.state.device
        loops = {
            "SegFit": our_loop(fit),
            "plain loop": plain_loop(config, device, options.workers),
        }
        times: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(options.rounds):
            names = list(loops)[:: 1 if number % 2 else -1]
            for name in names:
                times[name].append(1000 * turn(loops[name], options.steps, device))
    facts = ", ".join(f"{key}: {training.facts[key]}" for key in ("model", "precision", "threads"))
    print(f"{facts}; batch {config.batch_size} × {config.accumulate}, patch {config.patch_size}")
    for name, values in times.items():
        print(f"{name}: {summary(values, ' ms')}")
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    print(f"plain loop / SegFit: {summary(ratios)}")


if __name__ == "__main__":
    main(sys.argv[1:])
