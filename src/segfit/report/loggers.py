"""What listens to a training run: console, log file, curves, and loggers.

Loggers get its numbers, under the same tags: TensorBoard, a CSV file, Weights & Biases, MLflow.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from segfit.engine.events import EndLog, EpochLog, Listener, Listeners, RunInfo, StepLog
from segfit.errors import SegFitError
from segfit.report.lines import LogFile, ScoresFile
from segfit.runs.files import COMPLETE, RunFolder
from segfit.system.files import atomic_write
from segfit.system.monitor import Monitor, summed_up

if TYPE_CHECKING:  # see segfit.engine.events
    from segfit.engine.task import Batch

_PROJECT = "segfit"


class Logger(Listener):
    """A listener that also gets numbers."""

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Write tag → number, as they are after so many updates."""


class Loggers(Listener):
    """Turns the events of a training into numbers by tag, for some loggers:

    - loss/train, loss/epoch (mean of an epoch), loss/val
    - score/<name>: of each validation
    - what the task adds, such as score_iou/<class>
    - speed/samples_per_second, speed/data_wait_percent, speed/epoch_seconds
    - system/peak_memory_gib, and what `monitor` samples: system/utilisation, …
    - train/lr, train/grad_norm, train/loss_scale, train/scaler_skips

    `loggers`, by label, get the events themselves, too. One that raises gives `notify` one notice and gets nothing more;
    training continues. `monitor` runs from start to close.
    """

    def __init__(
        self,
        loggers: Mapping[str, Logger],
        monitor: Monitor | None = None,
        notify: Callable[[str], None] = print,
    ) -> None:
        self._loggers, self._monitor, self._notify = dict(loggers), monitor, notify
        for event in ("began", "end"):
            setattr(self, event, partial(self._each, event))

    def start(self, info: RunInfo) -> None:
        """Start the monitor."""
        self._each("start", info)
        if self._monitor is None:
            return
        self._monitor.start()
        import torch  # by now it is there

        if torch.cuda.is_available() and self._monitor.probe.source != "NVML":
            self._notify(
                "NVML does not answer: what is logged as system/* are the processor's values, not the card's. "
                "It comes with NVIDIA's driver and pip install nvidia-ml-py."
            )

    def log(self, log: StepLog) -> None:
        """Log the numbers of training."""
        values = {
            "loss/train": log.loss,
            "train/lr": log.lr,
            "train/grad_norm": log.grad_norm,
            "train/loss_scale": log.loss_scale,
            "train/scaler_skips": log.skipped,
            "speed/samples_per_second": log.samples_per_second,
            "speed/data_wait_percent": 100 * log.data_wait,
            "system/peak_memory_gib": log.memory_gib,
        }
        means = summed_up(self._monitor.fresh() if self._monitor is not None else []).mean
        values |= {f"system/{name}": value for name, value in means.items()}
        self._each("scalars", values, log.update)

    def epoch(self, log: EpochLog) -> None:
        """Log the duration of the epoch and its validation."""
        values = {"loss/epoch": log.loss, "speed/epoch_seconds": log.seconds}
        if log.result is not None:
            for name, value in log.result.scores.items():
                values["loss/val" if name == "loss" else f"score/{name}"] = value
            values |= {tag: one for tag, one in log.result.scalars.items() if one is not None}
        self._each("scalars", values, log.update)
        self._each("epoch", log)

    def close(self) -> None:
        """Stop the monitor and close the loggers."""
        if self._monitor is not None:
            self._monitor.close()
        self._each("close")

    def _each(self, method: str, *arguments: object) -> None:
        for label, logger in list(self._loggers.items()):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:
                del self._loggers[label]
                reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                self._notify(f"{label}: cannot write: {reason}. Training continues without it.")
                with suppress(Exception):
                    logger.close()


class CsvLogger(Logger):
    """Appends a line `update,tag,value` a number; of two lines of an update and tag the later one counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Append them."""
        # Opened each time: lines are written whole, and are there for other programs to read.
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(("update", "tag", "value"))
            writer.writerows((update, tag, value) for tag, value in values.items())


class FirstBatch(Logger):
    """Writes what `draw` makes of a run's first batch and its seed, a picture (H, W, 3) uint8 or None, as PNG."""

    def __init__(self, path: Path, draw: Callable[[Batch, int], Any]) -> None:
        self._path, self._draw = path, draw

    def began(self, batch: Batch, seed: int) -> None:
        """Draw it."""
        picture = self._draw(batch, seed)
        if picture is not None:
            with atomic_write(self._path, sync=False) as file:
                Image.fromarray(picture).save(file, "png")


class WandbLogger(Logger):
    """Logs by Weights & Biases' own client; offline unless WANDB_MODE says otherwise (then: `wandb sync`)."""

    def __init__(self, folder: Path, config_text: str) -> None:
        wandb: Any = import_module("wandb")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=folder.name,
            id=re.sub(r"[^\w-]", "-", "-".join(folder.absolute().parts[-2:])),  # as it was, resumed
            resume="allow",
            dir=folder,
            config=OmegaConf.to_container(OmegaConf.create(config_text)),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True),
        )

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Log them with their step."""
        self._run.log(dict(values), step=update)

    def end(self, log: EndLog) -> None:
        """Put the best scores into the summary."""
        self._run.summary.update({f"best/{key}": one for key, one in log.best_scores.items()})

    def close(self) -> None:
        """Write what is left."""
        self._run.finish()


class MlflowLogger(Logger):
    """Logs by MLflow's own client, where MLFLOW_TRACKING_URI says; by default into the working directory."""

    def __init__(self, folder: Path, hparams: Mapping[str, object]) -> None:
        self._mlflow: Any = import_module("mlflow")
        self._mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT))
        # A run that is resumed continues its own.
        query = f"tags.folder = '{folder.absolute()}'".replace("\\", "\\\\")
        known = self._mlflow.search_runs(filter_string=query, output_format="list")
        tags = {"folder": str(folder.absolute())}
        key = known[0].info.run_id if known else None
        self._mlflow.start_run(key, run_name=folder.name, tags=tags)
        if not known:
            self._mlflow.log_params(hparams)

    def scalars(self, values: Mapping[str, float], update: int) -> None:
        """Log them with their step."""
        known = {tag: value for tag, value in values.items() if math.isfinite(value)}
        metrics = {re.sub(r"[^\w/. -]", "_", tag): value for tag, value in known.items()}
        self._mlflow.log_metrics(metrics, step=update)

    def end(self, log: EndLog) -> None:
        """Log the best scores, and how it ended."""
        self.scalars({f"best/{key}": one for key, one in log.best_scores.items()}, log.updates)
        self._mlflow.end_run("FINISHED" if log.reason in COMPLETE else "KILLED")

    def close(self) -> None:
        """End the run, unless it has ended."""
        self._mlflow.end_run("FAILED")


def run_listener(
    files: RunFolder,
    console: Listener,
    config: DictConfig,
    hparams: Mapping[str, Any],
    *,
    monitor: Monitor | None = None,
    first_batch: Callable[[Batch, int], Any] | None = None,
    resume_step: int | None = None,
    notices: Sequence[str] = (),
    posted: Callable[[], list[str]] = list,
) -> Listeners:
    """Return console, log file, scores file, and the loggers of the config's `report`.

    The log file also gets `notices`, which the console has shown before. `posted` returns the new notices of other
    processes; each is shown and logged once. With `first_batch`, which draws as for `FirstBatch`, there are pictures for the
    run's page. A logger that cannot be made gives a notice.
    """
    config_text = OmegaConf.to_yaml(config)
    log = LogFile(files.log)
    for line in notices:
        log.notice(line)
    shown = Listeners(console, log)
    kinds: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: import_module("segfit.report.tensorboard").TensorBoardLogger(
            files.tensorboard, config_text, hparams, resume_step
        ),
        "csv": lambda: CsvLogger(files.scalars),
        "wandb": lambda: WandbLogger(files.path, config_text),
        "mlflow": lambda: MlflowLogger(files.path, hparams),
    }
    made: dict[str, Logger] = {}
    for name in config.report.logger:
        if name == "tensorboard" and not config.report.tensorboard:
            continue
        try:
            made[name] = kinds[name]()
        except SegFitError as error:
            shown.notice(str(error))
        except Exception as error:  # not installed, or at odds with protobuf or NumPy; no server
            shown.notice(
                f"report.logger={name} cannot be used ({type(error).__name__}: {error}): training continues without it. "
                f"pip install {name}, or leave it away."
            )
    if first_batch is not None:
        made["first_batch.png"] = FirstBatch(files.first_batch, first_batch)
    scores = ScoresFile(files.scores, files.curves if first_batch is not None else None)
    passed_on = _Posted(posted, shown, notices)
    return Listeners(console, log, scores, passed_on, Loggers(made, monitor, shown.notice))


class _Posted(Listener):
    """A listener that passes on the notices of other processes, each once, when the loop logs."""

    def __init__(
        self, posted: Callable[[], list[str]], listener: Listener, known: Sequence[str]
    ) -> None:
        self._posted, self._listener, self._known = posted, listener, set(known)

    def notice(self, message: str) -> None:
        self._known.add(message)

    def _pass_on(self, _event: object) -> None:
        for line in self._posted():
            if line not in self._known:
                self._known.add(line)
                self._listener.notice(line)

    start = log = epoch = end = _pass_on  # type: ignore[assignment]
