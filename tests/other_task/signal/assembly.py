"""Noisy signals in, clean ones out."""

from dataclasses import dataclass, field

import numpy as np
import torch
from segfit.tasks.signal.schema import MEMORY_ADVICE
from torch import nn

from segfit.engine.distributed import SINGLE_PROCESS
from segfit.engine.findings import Findings
from segfit.models.build import Weights


@dataclass
class Waves:
    name: str
    first: int
    size: int
    length: int
    noise: float

    def __len__(self):
        return self.size

    def id(self, index):
        return f"{self.name}_{index:03d}"

    def files(self, index):
        return []

    def read(self, index):
        draw = np.random.default_rng(self.first + index)
        time = np.linspace(0, 1, self.length)
        rates = draw.integers(1, 6, 2)
        clean = sum(np.sin(2 * np.pi * (rate * time + draw.random())) for rate in rates)
        return np.float32(clean + draw.normal(0, self.noise, self.length)), np.float32(clean)


@dataclass
class Signals(torch.utils.data.Dataset):
    source: Waves

    def __len__(self):
        return len(self.source)

    def where(self, index):
        return self.source.id(index)

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key
        noisy, clean = self.source.read(index)
        return {"noisy": noisy, "clean": clean, "index": index}


@dataclass
class Errors:
    task: "SignalTask"
    found: list = field(default_factory=list)

    def update(self, forward, batch):
        off = forward(batch["noisy"][:, None])[:, 0] - batch["clean"]
        self.found.append(off.square().mean(1))

    def result(self):
        found = torch.cat(self.found).tolist()  # synchronises
        mse = float(np.mean(self.task.distributed.gather(found)))
        return Findings(scores={"mse": mse, "loss": mse})


@dataclass
class SignalTask:
    distributed: object = SINGLE_PROCESS
    memory_advice: str = MEMORY_ADVICE

    def prepare(self, batch, seed):
        return batch["noisy"][:, None], batch["clean"]

    def totals(self, targets):
        return targets.new_full((1,), targets.numel())

    def loss(self, outputs, targets, totals):
        return (outputs[:, 0].float() - targets).square().sum() / totals[0]

    def split(self, inputs, targets, size):
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def meter(self):
        return Errors(self)


def make_sources(config):
    rest = (config.length, config.data.noise)
    train = Waves("train", 0, config.data.train_size, *rest)
    return {"train": train, "val": Waves("val", 10**6, config.data.val_size, *rest)}


def make_train_dataset(config, source):
    return Signals(source)


make_held_out_dataset = make_train_dataset


def reading_options(config):
    return {"length": config.length, "noise": config.data.noise}


def make_network(config, *, pretrained):
    width, layers = config.model.channels, []
    for inputs in (1, width):
        layers += [nn.Conv1d(inputs, width, 5, padding=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv1d(width, 1, 5, padding=2)), Weights()


def example_input(config, batch_size, device):
    return torch.zeros(batch_size, 1, config.length, device=device)


def make_task(config, device, *_, distributed=SINGLE_PROCESS, **__):
    return SignalTask(distributed)
