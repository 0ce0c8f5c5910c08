"""Who takes part in peers.py: each in a process of its own, all timed by one kind of clock.

Data, model, loss and optimizer of everybody are those that SegFit's own builders make of one config.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX

if TYPE_CHECKING:
    from segfit.assembly.training import Training
    from segfit.engine.task import Batch


FACTS = ("device", "model", "precision", "workers", "threads")


class EnoughError(Exception):
    """Everything is measured: unwinds whoever's loop is asking for a batch."""


@dataclass(frozen=True)
class Contestant:
    """What a process is to run.

    Args:
        name: as the tables call it.
        kind: a key of `KINDS`.
        overrides: of the config, on top of the case's.
        options: of the kind.
        aside: of the contestant before: its process takes blocks of the bare update, too. Two processes differ by
            a few percent for no reason that one could name, which is more than a loop may cost.
    """

    name: str
    kind: str
    overrides: tuple[str, ...] = ()
    options: tuple[tuple[str, int], ...] = ()
    aside: bool = False


class Clock:
    """Times blocks of steps by the loop's own requests for batches, and lets it continue when asked to.

    A step lasts from one request to the next; a loop that asks some batches ahead does so all the time. The first
    `warm` steps after each pause and after the start of an epoch are not counted, and a block that an epoch's end
    cuts short is taken again.

    Args:
        connection: gets `facts` when the loop first asks, then the times; receives "go", "stop", or "aside": to
            take a block of `aside` instead, before the loop continues.
        warm: steps of a block that are not counted.
        steps: steps that are.
        synchronise: waits for the device, at both ends of what is counted.
    """

    def __init__(
        self, connection: Connection, warm: int, steps: int, synchronise: Callable[[], None]
    ) -> None:
        self.connection = connection
        self.warm, self.steps = warm, steps
        self.synchronise = synchronise
        self.done: int | None = None  # steps of the block; None before the first "go"
        self.start = self.waited = 0.0
        self.facts: dict[str, str] = {}  # what really runs
        self.aside: Callable[[], None] = lambda: None  # a step without the loop

    def epoch(self) -> None:
        """Begin the block again: an epoch begins."""
        if self.done is not None:
            self.done = 0

    def request(self) -> None:
        """Note that the loop wants a batch.

        Raises:
            EnoughError: if nothing more is to be measured.
        """
        if self.done is None:
            self.connection.send(self.facts)
            self._pause()
        elif self.done == self.warm + self.steps:
            self.synchronise()
            seconds = (time.perf_counter() - self.start) / self.steps
            self.connection.send((seconds, self.waited / self.steps))
            self._pause()
        if self.done == self.warm:
            self.synchronise()
            self.start, self.waited = time.perf_counter(), 0.0

    def arrived(self, waited: float) -> None:
        """Note that the loop has its batch, after `waited` seconds."""
        self.waited += waited
        assert self.done is not None
        self.done += 1

    def _pause(self) -> None:
        while (asked := self.connection.recv()) == "aside":
            self._take_aside()
        if asked != "go":
            raise EnoughError
        self.done = 0

    def _take_aside(self) -> None:
        for _ in range(self.warm):
            self.aside()
        self.synchronise()
        start = time.perf_counter()
        for _ in range(self.steps):
            self.aside()
        self.synchronise()
        self.connection.send(((time.perf_counter() - start) / self.steps, 0.0))


class Clocked:
    """A loader whose requests are timed by a clock.

    Args:
        loader: gives batches, epoch after epoch.
        clock: is notified.
        next_epoch: called with 0, 1, 2, … before each epoch.
    """

    def __init__(
        self, loader: Any, clock: Clock, next_epoch: Callable[[int], None] = lambda _: None
    ) -> None:
        self.loader = loader
        self.clock = clock
        self.next_epoch = next_epoch
        self.epochs = count()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        self.next_epoch(next(self.epochs))
        self.clock.epoch()
        batches = iter(self.loader)
        for given in count():
            self.clock.request()
            asked = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                if given < self.clock.warm + self.clock.steps:
                    raise SegFitError(
                        f"an epoch has {given} batches, fewer than a block has steps. Lower --steps."
                    ) from None
                return
            self.clock.arrived(time.perf_counter() - asked)
            yield batch


def run(contestant: Contestant, overrides: list[str], blocks: tuple[int, int], pipe: Any) -> None:
    """Run a contestant until it is asked to stop; the target of a process.

    Args:
        contestant: who.
        overrides: of the config.
        blocks: uncounted and counted steps of a block.
        pipe: a connection to the process that asks.
    """
    import torch

    def synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    try:
        with tempfile.TemporaryDirectory() as folder:
            clock = Clock(pipe, *blocks, synchronise)
            config = composed([*overrides, *contestant.overrides])
            KINDS[contestant.kind](config, Path(folder), clock, **dict(contestant.options))
    except (EnoughError, EOFError, KeyboardInterrupt):
        return
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def composed(overrides: list[str]) -> Any:
    """Return the config that train.py would compose of these overrides."""
    from hydra import compose, initialize_config_dir

    from segfit.cli import main as cli
    from segfit.config.check import check

    cli.setup()
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        config = compose("train", overrides)
    check(config)
    return config


def made(config: Any, folder: Path, clock: Clock) -> Training:
    """Return what SegFit's builders make of a config; the clock gets to know what really runs."""
    from segfit.assembly.training import make_training

    training = make_training(config, folder, lambda _: None)
    clock.facts = {key: training.facts[key] for key in FACTS}
    return training


# -------------------------------------------------------------------------------------- ourselves


def segfit(config: Any, folder: Path, clock: Clock) -> None:
    """Train as train.py does: console (to nowhere), log file and TensorBoard listen."""
    from rich.console import Console

    from segfit.report.console import console_report
    from segfit.report.loggers import run_listener
    from segfit.runs.files import RunFolder

    training = made(config, folder, clock)
    clock.aside = _bare_update(training)
    batches = training.fit.train.batches  # type: ignore[attr-defined]
    batches.loader = Clocked(batches.loader, clock)
    with Path(os.devnull).open("w") as nowhere:
        console = console_report(Console(file=nowhere))
        listener = run_listener(RunFolder(folder), console, config, training.hparams)
        training.fit.run(listener, training.facts)


def bare(config: Any, folder: Path, clock: Clock) -> None:
    """Make the same update again and again, on one batch that lies on the device."""
    _updates(made(config, folder, clock), clock)


def _updates(training: Training, clock: Clock) -> None:
    training.fit.state.model.train()
    update = _bare_update(training)
    for _ in Clocked(repeat(None), clock):
        update()


def _bare_update(training: Training) -> Callable[[], None]:
    """Return the update of a batch that lies on the device, the same again and again."""
    from segfit.engine.step import make_update

    fit = training.fit
    batch = next(iter(fit.train.epoch(0, 0)))

    def update() -> None:
        make_update(fit.state, fit.task, [batch], [0], fit.options.clip_grad_norm)

    return update


def smp(config: Any, folder: Path, clock: Clock, width: int) -> None:
    """Make the same update with the model of segmentation_models.pytorch.

    Args:
        config: of the training.
        folder: for its files.
        clock: is notified.
        width: channels of the head.
    """
    import segmentation_models_pytorch

    from segfit.assembly.state import to_device
    from segfit.config.check import plain
    from segfit.engine.optim import make_optimizer

    training = made(config, folder, clock)
    model = segmentation_models_pytorch.Segformer(
        encoder_name=f"mit_{config.model.variant}",
        encoder_weights=None,
        decoder_segmentation_channels=width,
        classes=config.data.num_classes,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    clock.facts["model"] = f"smp.Segformer ({parameters / 1e6:.1f} M parameters)"
    state = training.fit.state
    model = to_device(model, state.device, config.channels_last)
    optimizer = make_optimizer(model, lr=config.lr, **plain(config.optimizer))
    training.fit.state = replace(state, model=model, forward=model, optimizer=optimizer)
    _updates(training, clock)


# ------------------------------------------------------------------------------------- the others


def made_for_others(config: Any, folder: Path, clock: Clock, lend: int) -> tuple[Training, Clocked]:
    """Return the builders' training for another's loop, and the loader of its batches.

    The process keeps the C library's own way with memory, unless `lend`: `keep_freed_memory` is part of our loop.
    """
    from segfit.assembly import state

    if not lend:
        state.keep_freed_memory = lambda: None
    warnings.simplefilter("ignore")  # of versions that do not know each other yet
    training = made(config, folder, clock)
    train = training.fit.train
    loader = Clocked(train.batches.loader, clock, train.sampler.set_epoch)  # type: ignore[attr-defined]
    return training, loader


def _loss(training: Training, model: Any, batch: Batch, seed: int) -> Any:
    from torch.nn import functional as F

    images, targets = training.fit.task.prepare(batch, seed)
    return F.cross_entropy(model(images).float(), targets, ignore_index=IGNORE_INDEX)


def lightning(config: Any, folder: Path, clock: Clock, lend: int = 0) -> None:
    """Train by Lightning's Trainer in the state that Lightning calls barebones, made to be measured."""
    import lightning as L
    import torch

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    training, loader = made_for_others(config, folder, clock, lend)
    state = training.fit.state

    class Module(L.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = state.model

        def training_step(self, batch: Batch, index: int) -> Any:
            return _loss(training, self.model, batch, index)

        def configure_optimizers(self) -> Any:
            return state.optimizer

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            # Lightning's own refuses torch's fused AdamW under mixed precision. In fp16 gradients are still
            # scaled here, and stay unclipped.
            if config.clip_grad_norm is not None and state.precision.name != "fp16":
                torch.nn.utils.clip_grad_norm_(self.parameters(), config.clip_grad_norm)

    names = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
    trainer = L.Trainer(
        accelerator="gpu" if state.device.type == "cuda" else "cpu",
        devices=1,
        precision=names[state.precision.name],
        max_epochs=-1,
        barebones=True,
        default_root_dir=folder,
    )
    trainer.fit(Module(), loader)


def huggingface(config: Any, folder: Path, clock: Clock, lend: int = 0) -> None:
    """Train by transformers' Trainer without logging, saving, progress bar or its look for NaN in every loss."""
    import torch
    from transformers import Trainer, TrainingArguments

    logging.getLogger("transformers").setLevel(logging.ERROR)
    training, loader = made_for_others(config, folder, clock, lend)
    state = training.fit.state

    class Ours(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return loader

        def compute_loss(self, model: Any, inputs: Batch, *_: Any, **__: Any) -> Any:
            return _loss(training, model, inputs, self.state.global_step)

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        max_grad_norm=config.clip_grad_norm,
        bf16=state.precision.name == "bf16",
        fp16=state.precision.name == "fp16",
        use_cpu=state.device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(state.optimizer, lambda _: 1.0)
    trainer = Ours(
        state.model,
        arguments,
        train_dataset=loader.loader.dataset,
        optimizers=(state.optimizer, constant),
    )
    trainer.train()


KINDS: dict[str, Callable[..., None]] = {
    "segfit": segfit,
    "bare": bare,
    "smp": smp,
    "lightning": lightning,
    "huggingface": huggingface,
}
