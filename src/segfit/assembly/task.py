"""What a task package offers, and where the rest of the program gets it from.

Each class stands for a module of a task. Every task has the functions that are declared first; the methods stand for those
that a task has nothing of its own to say of. Together with the `schema` module (`TaskSchema` in `config/tasks.py`) this is
all that the rest of the program asks of a task. `segfit.tasks.segmentation` is the example.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.config.tasks import Feeding
from segfit.data.loader import collate
from segfit.data.preflight import Preflight
from segfit.data.source import Source
from segfit.engine.task import Batch, Task
from segfit.models.build import Exported, Weights
from segfit.report.evaluation import Evaluation
from segfit.tasks import module_of
from segfit.tasks.scored import ExtraMetric

# Splits of a config that is to be trained → samples that each needs.
TRAINED = {"train": 1, "val": 1}


class TaskAssembly:
    """The `assembly` module of a task: a config → its objects."""

    # (config) → the splits: train, val and perhaps test.
    make_sources: Callable[[DictConfig], dict[str, Source]]
    # (config, source) → a dataset: (index, seed) → a sample to train on; or one for a `GatheringLoader`, without workers.
    make_train_dataset: Callable[[DictConfig, Source], Any]
    # (config, source) → a dataset: index → a sample to score; or one for a `GatheringLoader`.
    make_held_out_dataset: Callable[[DictConfig, Source], Any]
    # (config, folder) → a dataset: index → a sample of a folder to predict, without a target.
    make_predict_dataset: Callable[[DictConfig, str], Any]
    # (config) → the options that the samples depend on, besides the files.
    reading_options: Callable[[DictConfig], dict[str, Any]]
    # (config, *, pretrained: bool) → the model, and which weights it has.
    make_network: Callable[..., tuple[nn.Module, Weights]]
    # (config, batch_size, device) → what the model gets of a training batch, in its memory format.
    example_input: Callable[[DictConfig, int, torch.device], Tensor]
    # (config, device, statistics=None, *, panels, distributed, extra) → what a batch means; the last three as in `ScoredTask`.
    make_task: Callable[..., Task]

    # Samples → one batch; the first dimension of each of its tensors counts them.
    collate: Callable[[Sequence[Any]], Batch] = staticmethod(collate)

    def check_sources(
        self,
        config: DictConfig,
        sources: Mapping[str, Source],
        needs: Mapping[str, int],
        progress: Callable[[int, int], None] | None = None,
    ) -> Preflight:
        """Look at the files of some splits; raise a SegFitError with every problem."""
        return Preflight()

    def samples_per_read(self, config: DictConfig) -> int:
        """Return how many training samples are made of what is read once, one after the other."""
        return 1

    def sample_weights(self, config: DictConfig, source: Any) -> Any:
        """Return how often each training sample comes, (N,) float64 up to a factor; None: once an epoch."""

    def held_out_batch_size(self, config: DictConfig) -> int:
        """Return the samples of a validation batch."""
        return int(config.batch_size)

    def augments_in_workers(self, config: DictConfig) -> bool:
        """Say whether data workers have work even where samples are cached."""
        return False

    def cached_forms(self, config: DictConfig, sources: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what `data.cache` keeps of some splits; nothing where the task keeps it by itself."""
        return {split: (source, "original") for split, source in sources.items()}

    def settle(
        self, config: DictConfig, earlier: Mapping[str, Any], notice: Callable[[str], None]
    ) -> None:
        """Give options that are null what follows from the weights, or from the config (by dotted keys) of `init`'s run."""

    def make_extra_metrics(self, config: DictConfig) -> list[ExtraMetric]:
        """Return the metrics of `metrics.extra`, each of which has scored an example; raise a SegFitError with all problems."""
        return []

    def make_statistics(
        self, config: DictConfig, sources: Mapping[str, Source], report: Any
    ) -> dict[str, Any]:
        """Return what the task takes from the training data, as plain values; metrics.json keeps them."""
        return {}

    def recorded_statistics(
        self, config: DictConfig, recorded: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        """Return `make_statistics` as metrics.json has it, None if that has to look at data; raise a SegFitError if it is invalid."""
        return {}

    def apply_options(
        self, config: DictConfig, options: DictConfig, notice: Callable[[str], None]
    ) -> None:
        """Change in a run's config what the options of evaluate.py say about the task."""

    def facts(self, config: DictConfig, sources: Mapping[str, Any]) -> dict[str, str]:
        """Return what really runs on some splits, label → text, that only this task knows."""
        return {}

    def remark(self, scores: Mapping[str, float]) -> str:
        """Return a sentence that goes with a run's best scores; empty for nothing."""
        return ""


class TaskPlanning:
    """The `planning` module of a task: what benchmark.py asks of it."""

    # (config) → a training micro-batch without content.
    train_example: Callable[[DictConfig], Batch]
    # (config, count, original size) → a validation batch without content, and the numbers that evaluation reads from it for
    # each sample.
    held_out_example: Callable[[DictConfig, int, tuple[int, ...]], tuple[Batch, list[int]]]

    def costliest(self, config: DictConfig) -> DictConfig:
        """Return a copy in which what may cost memory in some batches does so in all of them; no files are read."""
        return config.copy()

    def without_augmentation(self, task: Any) -> Any:
        """Return a task that augments nothing on the device."""
        return task

    def device_augmentation(self, config: DictConfig) -> tuple[Callable[[], Any], float] | None:
        """Return a function that augments a few values on the device, and a sample's size in them; None: there is none."""
        return None

    def draw_batch(self, task: Any, batch: Batch, seed: int, names: Sequence[str]) -> Any:
        """Return a picture (H, W, 3) uint8 of a training batch's first samples, whose names are given; None: there is none."""

    def feeding(self, config: DictConfig) -> Feeding:
        """Return how samples come to the model."""
        return Feeding()


class TaskEvaluation:
    """The `evaluation` module of a task: what evaluate.py and `segfit.load` ask of it."""

    # (config, task, options, path, data) → what scores a run's predictions on `data`, a source or a dataset without targets,
    # and writes them down. `task` is that of the run, which `options`, those of evaluate.py, may change.
    make_evaluation: Callable[[DictConfig, Any, DictConfig, Path, Any], Evaluation]
    # (config, task, options, inputs, go) → what a run predicts for inputs of Python; `go(task, dataset)` lets a task see the
    # samples of a dataset.
    predict: Callable[..., list[Any]]
    # (config, model, temperature, recorded) → what is exported of a model, which may be changed; `temperature` is of logits,
    # `recorded` the run's metrics.json.
    make_exported: Callable[[DictConfig, nn.Module, float, Mapping[str, Any]], Exported]


def assembly_of(config: DictConfig) -> TaskAssembly:
    """Return the `assembly` module of a config's task."""
    return module_of(config.task.name, "assembly", TaskAssembly)


def planning_of(config: DictConfig) -> TaskPlanning:
    """Return the `planning` module of a config's task."""
    return module_of(config.task.name, "planning", TaskPlanning)


def evaluation_of(config: DictConfig) -> TaskEvaluation:
    """Return the `evaluation` module of a config's task."""
    return module_of(config.task.name, "evaluation", TaskEvaluation)


def sample_bytes(config: DictConfig) -> int:
    """Return the bytes of a training sample as it comes from the dataset."""
    with torch.device("meta"):
        batch = planning_of(config).train_example(config)
    content = [tensor for tensor in batch.values() if tensor.ndim > 1]  # not the indices
    return sum(tensor.nbytes for tensor in content) // int(config.batch_size)
