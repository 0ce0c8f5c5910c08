"""Which tasks there are, and the schema of each; never torch.

A task is a folder of `segfit.tasks`, or of a folder named in the environment variable SEGFIT_TASKS. Its `schema` module
says what a run of the task has besides what every run has; its `assembly` module makes the objects.
"""

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

import segfit.tasks
from segfit.config.benchmark import MODES, benchmark_schema
from segfit.config.schema import EvaluateConfig, RunConfig
from segfit.errors import SegFitError, nearest, quoted
from segfit.system.files import reporting

DEFAULT = "segmentation"
# Options that are text whatever it looks like: a folder may be called 1e3, ~/x or "a (b), c".
_TEXT = re.compile(
    r"(\+{0,2}(?:run|compare|resume|init|out|root|images|export|model\.weights|"
    r"data\.(?:root|images|masks|image_name|mask_name|cache_dir|train|val|test|input|target|date|split\.group|split\.lists))=)"
    r"(?!null$|['\"\[]|.*(?:\$\{|\\[\\()\[\]{}:=, ]))(.+)",
    re.DOTALL,
)
_NAMES = re.compile(r"(\+{0,2}data\.class_names=)\[([^'\"\[\]{}\\$]+)\]")


@dataclass(frozen=True)
class Feeding:
    """What benchmark=ladder and optimize have to know of how a task's samples come to the model."""

    plain: Mapping[str, Any] = field(default_factory=dict)  # options of the plainest way
    # faster ways: rung of the ladder → options
    faster: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    larger: Sequence[int] = (1,)  # the ladder's larger batches, in multiples of the usual one
    idle: Mapping[str, str] = field(default_factory=dict)  # option that changes nothing → why


class TaskSchema:
    """What the `schema` module of a task offers; it may leave out whatever has a value here."""

    Run: type[RunConfig]  # the schema of its runs
    Evaluate: type[EvaluateConfig]  # the schema of evaluate.py for them
    GROUPS: Mapping[str, Mapping[str, type]]  # "model", "data", … → a choice's name → its schema
    MONITORS: Mapping[str, str]  # score that `monitor` may name → "max" (more is better) or "min"
    COLUMNS: Mapping[str, str]  # score that is shown → its label, in order
    UNIT: str  # of a sample, short: "img"
    USED: Sequence[tuple[str, str, str]] = ()  # as in config/schema.py, of the task's own options
    FLOAT64 = False  # scores are summed in float64, which Apple's GPUs do not have
    MEMORY_OPTIONS: Sequence[str]  # options of data that memory depends on
    MEMORY_ADVICE: str  # sentences: what to change if a single sample does not fit into memory

    # What is impossible or contradicts itself in a composed run of the task.
    problems: Callable[[DictConfig], Iterator[str]]
    sample_label: Callable[[DictConfig], str]  # what a sample of a config is called in tables
    # The original size of a held-out sample, as far as the config knows.
    held_out_shape: Callable[[DictConfig], tuple[int, ...]]

    def training_problems(self, config: DictConfig) -> Iterator[str]:
        """Yield what benchmark.py may measure, but nothing can learn from."""
        yield from ()

    def smaller_samples(
        self, config: DictConfig, share: float
    ) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield options for ever smaller samples, from `share` of the present size on (above 1: a larger one), and their cost."""
        yield from ()


def task_names() -> list[str]:
    """Return the names of all tasks."""
    segfit.tasks.add_folders()
    found = pkgutil.iter_modules(segfit.tasks.__path__)
    return sorted(module.name for module in found if module.ispkg)


def schema_of(name: str) -> TaskSchema:
    """Return the schema module of a task; raise a SegFitError if there is no such task."""
    known = task_names()
    if name not in known:
        raise SegFitError(
            f"task={name}: no such task.{nearest(str(name), known)} There are: {', '.join(known)}."
        )
    return segfit.tasks.module_of(name, "schema", TaskSchema)


def monitor_mode(config: DictConfig, extra: Sequence[Any] | None = None) -> str:
    """Return "max" if more of a run's monitored score is better, else "min".

    `extra` are the metrics of `metrics.extra`. For None they are made where one of them is monitored, which imports torch.
    Raises a SegFitError if there is no such score, or torchmetrics does not say whether more of it is better.
    """
    modes: dict[str, str | None] = dict(schema_of(config.task.name).MONITORS)
    monitor = config.monitor
    if monitor not in modes:
        if extra is None:
            assembly = segfit.tasks.module_of(config.task.name, "assembly", SimpleNamespace)
            extra = assembly.make_extra_metrics(config) if "metrics" in config else ()
        modes |= {name: one.mode for one in extra for name in one.names}
    if mode := modes.get(monitor):
        return mode
    known = [name for name, mode in modes.items() if mode]
    reason = f"there is no such score.{nearest(monitor, known)}"
    if monitor in modes:
        reason = "torchmetrics does not say whether more of it is better."
    raise SegFitError(f"monitor={monitor}: {reason} What can be monitored: {', '.join(known)}.")


def register(task: str) -> None:
    """Give Hydra the schemas of a task: names that the YAML files extend."""
    schema, store = schema_of(task), ConfigStore.instance()
    store.store(name="run_schema", node=schema.Run)
    store.store(name="benchmark_schema", node=benchmark_schema(schema.Run))  # type: ignore[arg-type]
    store.store(name="evaluate_schema", node=schema.Evaluate)
    for group, schemas in schema.GROUPS.items():
        for name, node in schemas.items():
            store.store(group=group, name=f"{name}_schema", node=node, package=group)
    for name, node in MODES.items():
        store.store(group="benchmark", name=f"{name}_schema", node=node)


def task_of(arguments: Sequence[str], folders: Sequence[Path]) -> str:
    """Return the task that a command line asks for: by `task=`, its experiment, or the run that is evaluated.

    A run that is resumed has its own config, whatever is composed. `folders` are those of `config_folders`. Raises a
    SegFitError if several tasks are asked for.
    """
    given = dict(text.split("=", 1) for text in arguments if "=" in text)
    if "task" in given:
        if "," in given["task"]:
            raise SegFitError(f"task={given['task']}: a sweep has one task. Launch one for each.")
        return given["task"]
    experiment = f"experiment/{given.get('experiment', '').split(',')[0]}.yaml"
    paths, pattern = [folder / experiment for folder in folders], r"override /task: *(\w+)"
    if "run" in given:
        run = given["run"].strip("'\"[]").split(",")[0].strip("'\"")
        paths, pattern = [run_folder(run) / "config.yaml"], r"^task:\s+name: *(\w+)"
    for path in paths:
        with suppress(OSError):  # whoever reads it says what is wrong
            found = re.search(pattern, path.read_text("utf-8", "replace"), re.MULTILINE)
            if found and found[1] in task_names():
                return found[1]
    return DEFAULT


def run_folder(given: str) -> Path:
    """Return the run folder that a path lies in, such as <run>/checkpoints/best.pt; the path itself where there is none.

    "last" is the run that was begun or resumed last, of those below outputs and multirun; raises a SegFitError if there is none.
    """
    if given == "last":
        found = [
            path
            for parent in ("outputs", "multirun")
            for depth in ("*", "*/*", "*/*/*")
            for path in Path(parent).glob(f"{depth}/config.yaml")
            if path.with_name("train.log").exists()
        ]
        if not found:
            raise SegFitError(f"last: there is no run below {Path.cwd()}/outputs. Give its folder.")
        return max(found, key=lambda path: path.stat().st_mtime).parent
    path = Path(given).expanduser()
    with reporting(f"{given}: cannot be read"):
        around = (path, *path.absolute().parents[:2]) if path.exists() else ()
        return next((one for one in around if (one / "config.yaml").is_file()), path)


def config_folders(arguments: Sequence[str], conf: Path) -> list[Path]:
    """Return the folders that YAML comes from: those of --config-dir, then `conf`."""
    folders = [text.partition("=")[2] for text in arguments if text.startswith("--config-dir=")]
    folders += [value for flag, value in pairwise(arguments) if flag in ("--config-dir", "-cd")]
    return [*map(Path, folders), conf]


def qualified(arguments: Sequence[str], task: str, folders: Sequence[Path]) -> list[str]:
    """Return a command line as Hydra has to read it: text in quotes, and choices of the task, where it has its own.

    With task=restoration, `hardware=8gb` becomes `hardware=restoration/8gb` if there is conf/hardware/restoration/8gb.yaml.
    A label_map replaces that of a preset, which Hydra would merge it with. What is typed beside `resume=` is for the run's
    own config: that of today may lack the key.
    """
    sweeps = any(text.startswith(("-m", "--multirun", "hydra.mode=")) for text in arguments)
    resumes = any(re.match(r"resume=(?!null$)", text) for text in arguments)
    lines: list[str] = []
    for text in arguments:
        if resumes and re.match(r"(?!hydra\.)\w+\.[\w.]+=", text):
            text = f"++{text}"
        elif text.startswith("data.label_map={"):
            lines.append("data.label_map=null")
        if (found := _TEXT.fullmatch(text)) and not (sweeps and "," in text):
            text = found[1] + quoted(found[2])
        elif found := _NAMES.fullmatch(text):
            text = f"{found[1]}[{','.join(repr(name.strip()) for name in found[2].split(','))}]"
        lines.append(text)
    for place, text in enumerate(lines):
        if found := re.fullmatch(r"(\+?(\w+)=)([\w,-]+)", text):
            start, group, choices = found.groups()
            files = [path for folder in folders for path in (folder / group / task).glob("*.yaml")]
            own = {path.stem: f"{task}/{path.stem}" for path in files}
            lines[place] = start + ",".join(own.get(name, name) for name in choices.split(","))
    return lines
