"""A config's own training and validation, on a card that is not there."""

import itertools
from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig

from segfit.assembly.data import batches_in_order, make_train_batches
from segfit.assembly.state import make_state
from segfit.assembly.task import assembly_of, planning_of
from segfit.config.check import plain
from segfit.config.tasks import schema_of
from segfit.engine.evaluate import evaluate
from segfit.engine.logging import TrainingLog
from segfit.engine.optim import make_optimizer
from segfit.engine.precision import Precision
from segfit.engine.step import make_update
from segfit.engine.task import Batch, count_samples
from tests.fakes.card import DEVICE, Card


class TrainingOnCard:
    """The state and task of a config on the card, with the batches of its own loader and prefetcher."""

    def __init__(self, card: Card, config: DictConfig, precision: str) -> None:
        self.card, self.config = card, config
        card.phase = "made"
        self.sources = assembly_of(config).make_sources(config)
        mode = Precision(precision, "cuda")
        self.state, _ = make_state(config, DEVICE, mode, 10, lambda _: None)
        self.outputs: torch.Tensor | None = None
        self.forward, self.state.forward = self.state.forward, self._cut
        self.task = assembly_of(config).make_task(config, DEVICE, panels={0: "first"})
        train = make_train_batches(config, self.sources["train"], DEVICE, 0)
        self.batches = itertools.chain.from_iterable(train.epoch(n, 0) for n in itertools.count())
        self._window()  # what the first batch does, only it does
        self.log = TrainingLog(self.state)

    def _window(self) -> list[Batch]:
        return list(itertools.islice(self.batches, self.config.accumulate))

    def _cut(self, inputs: torch.Tensor) -> torch.Tensor:
        self.outputs = self.card.rules.cut(self.forward(inputs))
        return self.outputs

    def update(self) -> None:
        """Make the next update, in the phases "copied" and "updated"."""
        card, config, state = self.card, self.config, self.state
        card.phase = "copied"
        window = self._window()
        card.phase = "updated"
        first = state.progress.update * len(window)
        state.model.train()
        seeds = range(first, first + len(window))
        kind: Any = type(self.task)
        with mock.patch.object(kind, "loss", card.rules.cutting(kind.loss)):
            made = make_update(state, self.task, window, seeds, config.clip_grad_norm)
        self.log.add(*made, sum(map(count_samples, window)), 0.0)

    def update_by(self, optimizer: DictConfig) -> None:
        """Make an update by another optimizer, of outputs and gradients that are there already."""
        state, outputs = self.state, self.outputs
        assert outputs is not None
        self.task = planning_of(self.config).without_augmentation(self.task)
        state.optimizer = make_optimizer(state.model, lr=1e-3, **plain(optimizer))
        for parameter in state.model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        state.forward = lambda _: outputs.detach().requires_grad_()
        self.update()

    def validate(self) -> None:
        """Log, and validate a batch."""
        card, config = self.card, self.config
        card.phase = "logged"
        self.log.log()
        card.phase = "validated"
        original = schema_of(config.task.name).held_out_shape(config)
        _, numbers = planning_of(config).held_out_example(config, 1, original)
        card.reads = itertools.cycle(numbers)
        dataset = assembly_of(config).make_held_out_dataset(config, self.sources["val"])
        first = range(min(len(dataset), assembly_of(config).held_out_batch_size(config)))
        held_out = batches_in_order(config, dataset, DEVICE, 0, lambda _: None, first)
        evaluate(self.state.evaluated(), self.task, held_out, self.state.precision)
        card.reads = iter(())
