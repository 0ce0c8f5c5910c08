"""How many windows a second a training takes: SegFit's beside a plain loop, in turn.

    python docs/benchmarks/forecasting.py [model=… data.lookback=… batch_size=… …]

    segfit  what train.py does with these options
    plain   the same model, as most people train it: a Dataset that cuts windows out of an array, a DataLoader, batches of
            128, fp32
    steps   the same, with an LSTM that reads row by row instead of patches, as most people write it

All train on the same series, with AdamW and the same loss. Speeds of neighbouring blocks are compared, so that a machine
that slows down does not count.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from segfit.assembly.task import assembly_of
from segfit.assembly.training import Training, make_training
from segfit.cli import main as cli
from segfit.config.check import check
from segfit.engine.step import make_update
from segfit.engine.task import count_samples
from segfit.system.hardware import device_name
from segfit.tuning.change import changed
from segfit.tuning.measure import windows

ROUNDS = 10
BLOCK_SECONDS = 2.0
PLAIN_BATCH = 128
DEFAULTS = {"task": "forecasting", "hardware": "cpu", "model": "lstm", "batch_size": "512"}


class CutWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of standardised series, cut out one by one.

    Args:
        series: `(T, columns)` float32 each.
        lookback: rows that are seen.
        horizon: rows that are forecast.
    """

    def __init__(self, series: list[NDArray[np.float32]], lookback: int, horizon: int) -> None:
        self.series, self.lookback, self.horizon = series, lookback, horizon
        self.each = len(series[0]) - lookback - horizon + 1

    def __len__(self) -> int:
        return len(self.series) * self.each

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        which, start = divmod(index, self.each)
        middle = start + self.lookback
        rows = self.series[which]
        past, truth = rows[start:middle], rows[middle : middle + self.horizon]
        return torch.from_numpy(past), torch.from_numpy(truth)


def main() -> None:
    """Measure and print."""
    given = dict(text.split("=", 1) for text in sys.argv[1:])
    overrides = [f"{key}={value}" for key, value in {**DEFAULTS, **given}.items()]
    config = composed(overrides)
    with tempfile.TemporaryDirectory() as folder:
        training = make_training(config, Path(folder), lambda _: None)
    state = training.fit.state
    ways = {"segfit": segfit(training, config), "plain": plain(config, state.device)}
    if config.model.get("patch") and config.model.name == "lstm":
        ways["steps"] = plain(changed(config, {"model.patch": 0}), state.device)
    for updates in ways.values():
        block(updates)  # warms up
    rounds = [{name: block(updates) for name, updates in ways.items()} for _ in range(ROUNDS)]
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {device_name(state.device)}, {threads} thread(s)")
    print(f"{' '.join(overrides)}: {training.facts['model']}, {state.precision.name}")
    for name in ways:
        speed = statistics.median(one[name] for one in rounds)
        ratios = [one["segfit"] / one[name] for one in rounds]
        low, median, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:8}{speed:8.0f} windows/s; segfit is {median:.2f} times as fast ({low:.2f} to {high:.2f})"
        )


def composed(overrides: list[str]) -> DictConfig:
    """Return the checked config of train.py."""
    with patch.object(sys, "argv", ["train.py", *overrides]):
        cli.setup()  # for their task
        arguments = sys.argv[1:]
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        config = compose("train", arguments)
    check(config)
    return config


def plain(config: DictConfig, device: torch.device) -> Iterator[int]:
    """Train in a plain loop; yield the windows of each update."""
    assembly = assembly_of(config)
    table = assembly.make_sources(config)["train"].series.table  # type: ignore[attr-defined]
    pieces = zip(table.begins, table.ends, strict=True)
    series = [np.array(table.values[begin:end].tolist(), np.float32) for begin, end in pieces]
    series = [(rows - rows.mean(0)) / rows.std(0) for rows in series]
    model, _ = assembly.make_network(config, pretrained=False)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(config.lr))
    data = CutWindows(series, config.data.lookback, config.data.horizon)
    loader = DataLoader(data, PLAIN_BATCH, shuffle=True, drop_last=True)
    for _ in count():
        for past, truth in loader:
            loss = nn.functional.mse_loss(model(past.to(device)), truth.to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield len(past)


def segfit(training: Training, config: DictConfig) -> Iterator[int]:
    """Train as train.py does; yield the windows of each update."""
    fit = training.fit
    fit.state.model.train()
    for window in windows(fit):
        make_update(fit.state, fit.task, window, range(len(window)), config.clip_grad_norm)
        yield sum(map(count_samples, window))


def block(updates: Iterator[int]) -> float:
    """Make updates for some seconds; return the windows a second."""
    done, start = 0, time.perf_counter()
    while (seconds := time.perf_counter() - start) < BLOCK_SECONDS:
        done += next(updates)
    return done / seconds


if __name__ == "__main__":
    main()
