"""Which tasks there are, and the schema of each; never torch.

A task is a folder of `segfit.tasks`, or of a folder named in the environment variable SEGFIT_TASKS. Its `schema` module
says what a run of the task has besides what every run has; its `assembly` module makes the objects.
"""

import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, cast

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

import segfit.tasks
from segfit.config.benchmark import MODES, benchmark_schema
from segfit.config.schema import EvaluateConfig, RunConfig
from segfit.errors import SegFitError, nearest

DEFAULT = "segmentation"


class TaskSchema(Protocol):
    """What the `schema` module of a task offers.

    Attributes:
        Run: the schema of its runs.
        Evaluate: the schema of evaluate.py for them.
        GROUPS: config group → name of a choice → its schema; "model" and "data" at least.
        MONITORS: score that can pick the best checkpoint → "max" (more is better) or "min".
        COLUMNS: score that is shown → its label, in order.
        UNIT: of a sample, short: "img".
        MEMORY_OPTIONS: options of data that memory depends on.
        MEMORY_ADVICE: sentences that say what to change if a single sample does not fit into memory.
    """

    Run: type[RunConfig]
    Evaluate: type[EvaluateConfig]
    GROUPS: Mapping[str, Mapping[str, type]]
    MONITORS: Mapping[str, str]
    COLUMNS: Mapping[str, str]
    UNIT: str
    MEMORY_OPTIONS: Sequence[str]
    MEMORY_ADVICE: str

    def problems(self, config: DictConfig) -> Iterator[str]:
        """Yield what is impossible or contradicts itself in a composed run of the task."""

    def sample_label(self, config: DictConfig) -> str:
        """Return what a sample of a config is called in tables."""

    def held_out_shape(self, config: DictConfig) -> tuple[int, ...]:
        """Return the original size of a held-out sample, as far as the config knows."""

    def smaller_samples(
        self, config: DictConfig, share: float
    ) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield options for ever smaller samples, and what they cost, from a share (0-1) of the present size on."""


def task_names() -> list[str]:
    """Return the names of all tasks."""
    segfit.tasks.add_folders()
    return sorted(
        module.name for module in pkgutil.iter_modules(segfit.tasks.__path__) if module.ispkg
    )


def schema_of(name: str) -> TaskSchema:
    """Return the schema module of a task.

    Raises:
        SegFitError: if there is no such task.
    """
    known = task_names()
    if name not in known:
        raise SegFitError(
            f"task={name}: no such task.{nearest(str(name), known)} There are: {', '.join(known)}."
        )
    return cast(TaskSchema, import_module(f"segfit.tasks.{name}.schema"))


def monitor_mode(config: DictConfig) -> str:
    """Return "max" if more of a run's monitored score is better, else "min"."""
    return schema_of(config.task.name).MONITORS.get(config.monitor, "max")


def register(task: str) -> None:
    """Give Hydra the schemas of a task: names that the YAML files extend."""
    schema, store = schema_of(task), ConfigStore.instance()
    store.store(name="run_schema", node=schema.Run)
    store.store(name="benchmark_schema", node=_benchmark_schema(task))
    store.store(name="evaluate_schema", node=schema.Evaluate)
    for group, schemas in schema.GROUPS.items():
        for name, node in schemas.items():
            store.store(group=group, name=f"{name}_schema", node=node, package=group)
    for name, node in MODES.items():
        store.store(group="benchmark", name=f"{name}_schema", node=node)


@cache
def _benchmark_schema(task: str) -> type:
    return benchmark_schema(schema_of(task).Run)


# ------------------------------------------------------------------------------ command lines


def task_of(arguments: Sequence[str], folders: Sequence[Path]) -> str:
    """Return the task that a command line asks for: by `task=`, its experiment, or the run that is evaluated.

    A run that is resumed has its own config, whatever is composed.

    Args:
        arguments: of an entry point, without the program's name.
        folders: that hold YAML, as `config_folders` gives them.

    Raises:
        SegFitError: if it asks for several.
    """
    given = dict(text.split("=", 1) for text in arguments if "=" in text)
    if "task" in given:
        if "," in given["task"]:
            raise SegFitError(
                f"task={given['task']}: a sweep has one task. Launch a sweep for each."
            )
        return given["task"]
    if "run" in given:
        return _task_of_run(Path(given["run"].strip("'\"")).expanduser())
    if "experiment" in given:
        for folder in folders:
            path = folder / "experiment" / f"{given['experiment'].split(',')[0]}.yaml"
            found = (
                re.search(r"override /task: *(\w+)", path.read_text("utf-8"))
                if path.is_file()
                else None
            )
            if found:
                return found[1]
    return DEFAULT


def _task_of_run(run: Path) -> str:
    """Return the task of a run folder; the default for what is no run: whoever reads it says so."""
    try:
        values = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        name = values["task"]["name"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError, RecursionError):
        return DEFAULT
    return name if name in task_names() else DEFAULT


def config_folders(arguments: Sequence[str], conf: Path) -> list[Path]:
    """Return the folders that YAML comes from: those of --config-dir, then `conf`."""
    folders = [
        Path(text.partition("=")[2]) for text in arguments if text.startswith("--config-dir=")
    ]
    for flag, value in pairwise(arguments):
        if flag in ("--config-dir", "-cd"):
            folders.append(Path(value))
    return [*folders, conf]


def qualified(arguments: Sequence[str], task: str, folders: Sequence[Path]) -> list[str]:
    """Return a command line in which choices are those of the task, where it has its own of that name.

    With task=restoration, `hardware=8gb` becomes `hardware=restoration/8gb` if there is conf/hardware/restoration/8gb.yaml.
    """
    return [_qualified(text, task, folders) for text in arguments]


def _qualified(text: str, task: str, folders: Sequence[Path]) -> str:
    found = re.fullmatch(r"(\+?)(\w+)=([\w,-]+)", text)
    if found is None:
        return text
    plus, group, choices = found.groups()

    def own(choice: str) -> str:
        name = f"{task}/{choice}"
        return (
            name
            if any((folder / group / f"{name}.yaml").is_file() for folder in folders)
            else choice
        )

    return f"{plus}{group}={','.join(map(own, choices.split(',')))}"
