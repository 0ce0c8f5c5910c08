"""A trained model from its run folder alone: nothing of today's conf, nothing of the folder executed.

And such a model in Python: what evaluate.py predicts, for what lies in memory.
"""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from segfit.assembly.data import batches_in_order
from segfit.assembly.earlier import Notice
from segfit.assembly.state import make_device, to_device
from segfit.assembly.task import assembly_of, evaluation_of
from segfit.config.check import check, flat, plain
from segfit.config.tasks import run_folder, schema_of
from segfit.data.images import FAINT
from segfit.data.source import some
from segfit.engine.checkpoint import Checkpoints, load_checkpoint
from segfit.engine.evaluate import evaluate
from segfit.engine.precision import Precision
from segfit.engine.state import seed_everything
from segfit.engine.task import Task
from segfit.errors import SegFitError, raise_all
from segfit.report.text import hydra_override
from segfit.runs.files import RunFolder, read_json
from segfit.runs.folder import load_config, load_named

# Options that runs whose models are averaged may differ in, of data.
_FREE = ("data.check", "data.on_bad", "data.cache", "data.sampling", "data.crops_per_image", "data.foreground")  # fmt: skip


@dataclass(frozen=True)
class TrainedRun:
    """What a run folder makes when nothing else is asked."""

    folder: Path
    config: DictConfig  # the run's own, but for what evaluate.py's options say
    recorded: dict[str, Any]  # the run's metrics.json; empty where the run wrote none
    model: nn.Module  # with the checkpoint's weights, on the device, in eval mode
    device: torch.device
    precision: Precision
    epoch: int | None  # 0-based, of the checkpoint
    temperature: float = 1.0  # what logits are divided by before they become probabilities
    others: Sequence[Path] = ()  # folders of runs that the model averages, too

    def task(self, *given: Any, **more: Any) -> Any:
        """Return what a batch means, with the temperature: `TaskAssembly.make_task` of the run."""
        task: Any = assembly_of(self.config).make_task(self.config, self.device, *given, **more)
        return task if self.temperature == 1 else replace(task, temperature=self.temperature)


def load_runs(options: DictConfig, configs: Sequence[DictConfig], notice: Notice) -> TrainedRun:
    """Rebuild the runs of `options.run`; of several, one whose model gives the mean of their probabilities.

    Raises a SegFitError as `load_run`, or if the runs do not see, mean and hold out the same.
    """
    folders, loaded, once = list(options.run), [], cache(notice)
    tasks = [config.task.name for config in configs]
    if len({*tasks}) > 1:
        raise SegFitError(f"run={folders}: their tasks are {', '.join(tasks)}. One task at a time.")
    if len(folders) > 1 and "temperature" in options:
        options.temperature = options.temperature or 1.0  # that of their mean was never fitted
    for options.run, config in zip(folders, configs, strict=True):
        loaded.append(load_run(options, config, once))
    first = loaded[0]
    if len(loaded) == 1:
        return first
    options.run = folders
    make_ensemble = getattr(assembly_of(first.config), "make_ensemble", None)
    alone = [f"task={first.config.task.name}"] * (make_ensemble is None)
    alone += ["export"] * (options.export is not None)
    alone += ["temperature=fit"] * (options.get("temperature") == "fit")
    if make_ensemble is None or alone:
        raise SegFitError(f"run={folders}: {alone[0]} takes one run.")
    free = _FREE + ("data.split.fold",) * (options.split == "test")
    free += ("data.split.",) * (options.get("images") is not None)
    seen = [flat(plain(run.config)) for run in loaded]
    problems = [
        f"run={folder}: {key}={values.get(key)}, but {seen[0].get(key)} in {folders[0]}. Runs are averaged where they see, "
        f"mean and hold out the same; of folds, on split=test and images=…."
        for folder, values in zip(folders, seen, strict=True)
        for key in sorted({*values, *seen[0]})
        if key.startswith(("task.", "data.", "image_size")) and not key.startswith(free)
        if values.get(key) != seen[0].get(key)
    ]
    raise_all(problems)
    model = make_ensemble([run.model for run in loaded])
    return replace(first, model=model, epoch=None, others=[run.folder for run in loaded[1:]])


def load_run(options: DictConfig, config: DictConfig, notice: Notice) -> TrainedRun:
    """Rebuild a run's model from its folder alone.

    The folder may be untrusted: its config is read as plain values into the schema, its checkpoint as tensors;
    nothing of it is imported, resolved or executed.

    `options` are those of evaluate.py, checked; `config` is the run's, by `runs.load_config`, and becomes the result's.
    Raises a SegFitError if the checkpoint is missing, damaged or refused, or does not fit the config.
    """
    folder = Path(options.run).expanduser()
    recorded = read_json(RunFolder(folder).metrics)  # empty of a run that was killed
    if options.root is not None:
        if "root" not in config.data:
            raise SegFitError(
                f"root={options.root}: the run's data ({config.data.name}) are built in, they have no root."
            )
        config.data.root = options.root
    ran = recorded.get("precision")
    if options.precision is not None:
        config.precision.name = options.precision.name
    elif ran in ("fp32", "fp16", "bf16"):
        config.precision.name = ran
    if options.metrics.extra is not None:
        config.metrics.extra = options.metrics.extra
    config.batch_size = options.batch_size or config.batch_size
    config.loader.workers = options.workers
    config.loader.persistent = False  # there is one pass
    assembly_of(config).apply_options(config, options, notice)
    seed_everything(config.seed, config.deterministic)
    device, precision = make_device(config, options.device, notice)
    path, weights, epoch = _weights(folder, options.checkpoint)
    try:
        model, _ = assembly_of(config).make_network(config, pretrained=False)
        model.load_state_dict(weights)
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SegFitError(
            f"{path} does not fit the model in {RunFolder(folder).config} ({reason}). Was one of the two replaced?"
        ) from error
    model = to_device(model, device, config.channels_last).eval()
    temperature = _temperature(options, folder, epoch, notice)
    return TrainedRun(folder, config, recorded, model, device, precision, epoch, temperature)


def _temperature(options: DictConfig, folder: Path, epoch: int | None, notice: Notice) -> float:
    """Return the temperature that is asked for, else the one fitted to this checkpoint, else 1."""
    path, given = RunFolder(folder).temperature, options.get("temperature", 1.0)
    if given is not None or not path.exists():
        return 1.0 if given in (None, "fit") else float(given)
    kept = read_json(path)
    value = kept.get("temperature")
    if not (isinstance(value, float) and 0 < value < math.inf):
        raise SegFitError(f"{path}: temperature must be a number above 0. Delete the file.")
    if (kept.get("checkpoint"), kept.get("epoch")) != (options.checkpoint, epoch):
        notice(f"{path} is of another checkpoint and not used: temperature=fit fits it anew.")
        return 1.0
    notice(
        f"Probabilities are calibrated by temperature {value:.4g} ({path}); temperature=1 turns that off."
    )
    return value


def _weights(folder: Path, which: str) -> tuple[Path, dict[str, Tensor], int | None]:
    """Return a checkpoint's file, the weights that validation saw, and the epoch."""
    checkpoints = Checkpoints(RunFolder(folder).checkpoints)
    path = checkpoints.best if which == "best" else checkpoints.last
    if which == "best" and not path.exists() and checkpoints.last.exists():
        raise SegFitError(
            f"{path}: there is no best checkpoint, no validation gave the monitored score a value. Take checkpoint=last."
        )
    content = load_checkpoint(path)
    epoch = content.get("epoch")
    if progress := content.get("progress"):
        # Between epochs, what counts is the one that is over.
        epoch = max(progress["epoch"] - (progress["sample"] == 0), 0)
    return path, content.get("ema") or content["model"], epoch


class Model:
    """A trained run that predicts; see `segfit.load`. Raises a SegFitError as evaluate.py does."""

    def __init__(self, run: Any, **options: Any) -> None:
        named = [str(one) for one in (run if isinstance(run, (list, tuple)) else [run])]
        if not named or options.get("temperature") == "fit":
            raise SegFitError("segfit.load: needs a run; temperature=fit is for evaluate.py.")
        task = load_config(run_folder(named[0])).task.name
        for name in ("export", "push", "images", "out", "compare"):
            if options.get(name) is not None:
                raise SegFitError(
                    f"segfit.load: {name}={options[name]} is for evaluate.py, which writes files: "
                    f"python evaluate.py {hydra_override('run', named[0])} {name}=…"
                )
        if isinstance(options.get("precision"), str):
            options["precision"] = {"name": options["precision"]}
        try:
            schema = OmegaConf.structured(schema_of(task).Evaluate)
            self.options = cast(DictConfig, OmegaConf.merge(schema, options, {"run": named}))
        except OmegaConfBaseException as error:
            raise SegFitError(f"segfit.load: {str(error).splitlines()[0]}") from error
        check(self.options)
        self.run = load_runs(self.options, load_named(self.options), warnings.warn)
        self.run.config.data.on_bad_sample = "fail"

    def predict(self, inputs: Any) -> Any:
        """Return what the run predicts for an input, or the list of it for a list.

        Segmentation takes the path of an image, a PIL image or an array `(H, W, 3)` or `(H, W)`, and returns a `Prediction`.
        Restoration takes the same and returns the picture, `(H, W, 3)` or `(H, W)`, of its input's depth. Forecasting takes
        the past of a series, a data frame or an array, and returns what comes next. Raises a SegFitError if an input is none
        of these, or cannot be read.
        """
        config, many = self.run.config, isinstance(inputs, (list, tuple))
        given = list(inputs) if many else [inputs]

        def go(task: Task, dataset: Any) -> None:
            if len(dataset) != len(given):
                raise SegFitError("a volume is many images: evaluate.py predicts them (images=…).")
            order, device = range(len(dataset)), self.run.device
            batches = batches_in_order(config, dataset, device, 0, warnings.warn, order)
            evaluate(self.run.model, task, batches, self.run.precision)
            odd = []
            for index, text in batches.loader.remarks.items():
                path = isinstance(given[index], (str, os.PathLike))
                odd.append(f"{given[index] if path else f'image {index}'} ({text})")
            if odd:
                warnings.warn(f"{len(odd)} {FAINT.format(some(odd))}", stacklevel=4)

        predict = evaluation_of(config).predict
        statistics = assembly_of(config).recorded_statistics(config, self.run.recorded)
        task = self.run.task(statistics)
        results = predict(config, task, self.options, given, go) if given else []
        return results if many else results[0]
