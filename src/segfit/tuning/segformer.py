"""benchmark=segformer: the fast SegFormer against transformers' own, by turns, in one process."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from segfit.assembly.training import Training, make_training
from segfit.config.check import size_of
from segfit.engine.findings import Cell, Column, Findings, Table
from segfit.engine.fit import Fit
from segfit.engine.step import make_update
from segfit.errors import SegFitError
from segfit.system.hardware import GIB
from segfit.tuning.allocations import recorded_peak
from segfit.tuning.bench import Bench
from segfit.tuning.measure import first_window
from segfit.tuning.throughput import told_if_out_of_memory

WARMUP = 2

_SPEED = (
    Column("model"),
    Column("precision"),
    Column("pass"),
    Column("stock ms", ".1f"),
    Column("fast ms", ".1f"),
    Column("times faster", ".2f"),
    Column("p5", ".2f"),
    Column("p95", ".2f"),
)
_REST = (
    Column("model"),
    Column("precision"),
    Column("stock peak GiB", ".3f"),
    Column("fast peak GiB", ".3f"),
    Column("ratio", ".2f"),
    Column("of the step alone", ".2f"),
    Column("logits differ by", ".1e"),
    Column("gradients differ by", ".1e"),
)


@dataclass(frozen=True)
class Duel:
    """Times of the two, by turns.

    Args:
        stock: milliseconds of each of transformers' steps.
        fast: of each of ours.
    """

    stock: list[float]
    fast: list[float]

    def medians(self) -> tuple[float, float]:
        """Return the median milliseconds of stock and fast."""
        return float(np.median(self.stock)), float(np.median(self.fast))

    def times_faster(self) -> tuple[float, float, float]:
        """Return the ratio of the medians, and the 5th and 95th percentile of the rounds' ratios."""
        stock, fast = self.medians()
        low, high = np.percentile(np.divide(self.stock, self.fast), [5, 95]).tolist()
        return stock / fast, low, high


@dataclass(frozen=True)
class Comparison:
    """What was found about a variant in a precision.

    Args:
        variant: encoder size.
        precision: that really ran.
        training: whole updates, of forward, loss, backward, clipping and optimizer.
        inference: forward passes without gradients.
        peaks: peak of allocated GiB of a training, stock and fast; None: not recorded.
        state: GiB of it that parameters and the optimizer's state take, the same for both.
        logits: largest difference in fp32, as a share of the largest logit.
        gradients: the same of all parameters' gradients together.
    """

    variant: str
    precision: str
    training: Duel
    inference: Duel
    peaks: tuple[float, float] | None
    state: float
    logits: float
    gradients: float


def run(config: DictConfig, bench: Bench) -> Findings:
    """Compare all variants and precisions that the mode names.

    Raises:
        SegFitError: if the model is no SegFormer, or a step does not fit into memory.
    """
    if config.model.name != "segformer":
        raise SegFitError(
            f"benchmark=segformer with model={config.model.name}: it compares SegFormers. "
            "Choose model=segformer_b0 … segformer_b5."
        )
    mode = config.benchmark
    variants = list(mode.variants or [config.model.variant])
    precisions = list(mode.precisions or [config.precision.name])
    cases = [(variant, precision) for variant in variants for precision in precisions]
    found = []
    for done, (variant, precision) in enumerate(cases):
        bench.progress(f"{variant} {precision}", done, len(cases))
        one = OmegaConf.merge(
            config,
            {
                "model": {"variant": variant, "weights": None},
                "precision": {"name": precision},
                "loader": {"workers": 0},  # one window of batches is all that is read
            },
        )
        assert isinstance(one, DictConfig)
        with told_if_out_of_memory(one):
            found.append(compare(one, bench.notice))
    return _findings(config, found)


def compare(config: DictConfig, notice: Callable[[str], None]) -> Comparison:
    """Measure one variant in one precision."""
    peaks = None
    if config.benchmark.memory:
        peaks = (step_peak(config, fast=False), step_peak(config, fast=True))
    with _training(config, False, notice) as stock, _training(config, True, notice) as fast:
        fast.fit.state.model.load_state_dict(stock.fit.state.model.state_dict())
        logits, gradients = differences(stock.fit, fast.fit)
        rounds = config.benchmark.rounds
        training = duel(_updating(stock.fit), _updating(fast.fit), stock.fit, rounds)
        return Comparison(
            variant=config.model.variant,
            precision=fast.fit.state.precision.name,
            training=training,
            inference=duel(_predicting(stock.fit), _predicting(fast.fit), stock.fit, rounds),
            peaks=peaks,
            state=_state_gib(stock.fit),
            logits=logits,
            gradients=gradients,
        )


@contextmanager
def _training(
    config: DictConfig, fast: bool, notice: Callable[[str], None] = lambda _: None
) -> Iterator[Training]:
    """Build a config's training with the fast forward or the stock one, in a folder that goes away."""
    changed: dict[str, Any] = {"model": {"fast": fast}}
    if not fast:
        changed["channels_last"] = config.benchmark.stock_channels_last
    one = OmegaConf.merge(config, changed)
    assert isinstance(one, DictConfig)
    with TemporaryDirectory(prefix="segfit-") as folder:
        yield make_training(one, Path(folder), notice)


def step_peak(config: DictConfig, *, fast: bool) -> float:
    """Return the peak of allocated GiB over building a training and two updates.

    The optimizer's state exists from the second update on.
    """
    gc.collect()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with recorded_peak(device) as peak, _training(config, fast) as training:
        update = _updating(training.fit)
        update()
        update()
    return (peak.bytes - before) / GIB


def _state_gib(fit: Fit) -> float:
    """Return the GiB of parameters, buffers and optimizer state; after an update they are all there."""
    state = fit.state.optimizer.state.values()
    kept = [value for one in state for value in one.values() if isinstance(value, Tensor)]
    tensors = [*fit.state.model.parameters(), *fit.state.model.buffers(), *kept]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / GIB


def differences(stock: Fit, fast: Fit) -> tuple[float, float]:
    """Return how far logits and gradients differ in eval mode and fp32, as shares of the largest.

    Both models have the same weights. In eval mode nothing is dropped.
    """
    inputs, targets = stock.task.prepare(first_window(stock)[0], seed=0)
    totals = stock.task.totals(targets)

    def outcome(model: nn.Module) -> tuple[Tensor, Tensor]:
        model.eval()
        logits = model(inputs)
        stock.task.loss(logits, targets, totals).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        model.train()
        return logits.detach(), torch.cat(gradients)

    pairs = zip(outcome(stock.state.model), outcome(fast.state.model), strict=True)
    logits, gradients = (float((one - other).abs().max() / one.abs().max()) for one, other in pairs)
    return logits, gradients


def duel(stock: Callable[[], None], fast: Callable[[], None], fit: Fit, rounds: int) -> Duel:
    """Time two pieces of work by turns, after a warm-up."""
    for _ in range(WARMUP):
        stock()
        fast()
    found = Duel([], [])
    for _ in range(rounds):
        found.stock.append(_milliseconds(stock, fit))
        found.fast.append(_milliseconds(fast, fit))
    return found


def _milliseconds(work: Callable[[], None], fit: Fit) -> float:
    device = fit.state.device
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)  # synchronises: after a step, outside of what the events enclose
    return float(begin.elapsed_time(end))


def _updating(fit: Fit) -> Callable[[], None]:
    window = first_window(fit)
    seeds = list(range(len(window)))
    fit.state.model.train()

    def update() -> None:
        make_update(fit.state, fit.task, window, seeds, fit.options.clip_grad_norm)

    return update


def _predicting(fit: Fit) -> Callable[[], None]:
    inputs, _ = fit.task.prepare(first_window(fit)[0], seed=0)
    state = fit.state

    def predict() -> None:
        state.model.eval()
        with torch.inference_mode(), state.precision.autocast():
            state.forward(inputs)

    return predict


def _findings(config: DictConfig, found: list[Comparison]) -> Findings:
    height, width = size_of(config.image_size)
    speeds: list[Sequence[Cell]] = [
        [one.variant, one.precision, name, *duels.medians(), *duels.times_faster()]
        for one in found
        for name, duels in (("training", one.training), ("inference", one.inference))
    ]
    rest = [[one.variant, one.precision, *_peaks(one), one.logits, one.gradients] for one in found]
    what = f"batch {config.batch_size}, {width} × {height}, {config.data.num_classes} classes"
    faster = ", ".join(
        f"{one.variant} {one.precision} {one.training.times_faster()[0]:.2f}×" for one in found
    )
    return Findings(
        headline=f"Training step against transformers with SDPA, {what}: {faster} faster.",
        tables=[
            Table("speed", f"A step, {what}", _SPEED, speeds),
            Table("memory-and-parity", "Peak of a training step, and parity", _REST, rest),
        ],
        values={"comparisons": [asdict(one) for one in found]},
        scalars={
            f"times_faster/{one.variant}_{one.precision}": one.training.times_faster()[0]
            for one in found
        },
    )


def _peaks(one: Comparison) -> Iterator[float | None]:
    if one.peaks is None:
        return iter((None, None, None, None))
    stock, fast = one.peaks
    return iter((stock, fast, fast / stock, (fast - one.state) / (stock - one.state)))
