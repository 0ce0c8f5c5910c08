"""A trained run in Python: what evaluate.py predicts, for what lies in memory."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segfit.assembly.data import batches_in_order
from segfit.assembly.task import assembly_of, evaluation_of
from segfit.commands.load_run import load_runs
from segfit.config.check import check
from segfit.config.tasks import run_folder, schema_of
from segfit.engine.evaluate import evaluate
from segfit.engine.task import Task
from segfit.errors import SegFitError
from segfit.runs import folder as runs


class Model:
    """A trained run that predicts; see `segfit.load`. Raises a SegFitError as evaluate.py does."""

    def __init__(self, run: Any, **options: Any) -> None:
        given = list(run) if isinstance(run, (list, tuple)) else [run]
        named = [str(runs.last_run()) if one == "last" else str(one) for one in given]
        task = runs.load_config(run_folder(named[0])).task.name
        if isinstance(options.get("precision"), str):
            options["precision"] = {"name": options["precision"]}
        try:
            schema = OmegaConf.structured(schema_of(task).Evaluate)
            self.options = cast(DictConfig, OmegaConf.merge(schema, options, {"run": named}))
        except OmegaConfBaseException as error:
            raise SegFitError(f"segfit.load: {str(error).splitlines()[0]}") from error
        check(self.options)
        self.run = load_runs(self.options, runs.load_named(self.options), warnings.warn)
        self.run.config.data.on_bad_sample = "fail"

    def predict(self, inputs: Any) -> Any:
        """Return what the run predicts for an input, or the list of it for a list.

        Segmentation takes the path of an image, a PIL image or an array `(H, W, 3)` or `(H, W)`, and returns a `Prediction`.
        Restoration takes the same and returns the picture, `(H, W, 3)` or `(H, W)`, of its input's depth. Forecasting takes
        the past of a series, a data frame or an array, and returns what comes next. Raises a SegFitError if an input is none
        of these, or cannot be read.
        """
        config, many = self.run.config, isinstance(inputs, (list, tuple))
        predict, given = evaluation_of(config).predict, list(inputs) if many else [inputs]
        go = partial(self._go, len(given))
        task = assembly_of(config).make_task(config, self.run.device)
        results = predict(config, task, self.options, given, go) if given else []
        return results if many else results[0]

    def _go(self, count: int, task: Task, dataset: Any) -> None:
        if len(dataset) != count:
            raise SegFitError(
                "a volume holds several images: evaluate.py predicts them (images=…)."
            )
        config, device, samples = self.run.config, self.run.device, range(len(dataset))
        batches = batches_in_order(config, dataset, device, 0, warnings.warn, samples)
        evaluate(self.run.model, task, batches, self.run.precision)
