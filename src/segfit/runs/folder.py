"""The run folder: the one record of what was trained, and all that evaluation needs.

    config.yaml       the composed config, resolved, nothing left to interpolate
    overrides.yaml    what was typed
    checkpoints/      last.pt to go on from, best.pt to evaluate
    bad_batches/      batches that were left out, to look at
    tensorboard/      events
    train.log         what was told
    scores.jsonl      a line a validation, as it was made
    metrics.json      scores, speed, memory, and what really ran
    .lock             the process that trains; others are refused

A run folder may come from a stranger: configs are read as plain values (no interpolation, no tags) into the
schema, and checkpoints as plain tensors.
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from segfit.config.check import check
from segfit.config.tasks import schema_of
from segfit.errors import SegFitError
from segfit.runs import lock as locks
from segfit.runs.untrusted import read_yaml, refuse_links
from segfit.system.files import replace_text
from segfit.system.torchrun_env import launched

CONFIG = "config.yaml"
OVERRIDES = "overrides.yaml"
METRICS = "metrics.json"
SCORES = "scores.jsonl"
_WRITTEN = [
    *(CONFIG, OVERRIDES, METRICS, SCORES, "train.log", "checkpoints", "bad_batches", "tensorboard"),
]

# What may change when a run goes on; anything else would make it another run.
_RESUMABLE = (
    "batch_size",
    "accumulate",
    "epochs",
    "max_steps",
    "max_left_out",
    "patience",
    "val_every",
    "limit_val_batches",
    "device",
    "compile",
    "data.root",
    "data.check",
    "data.on_bad_sample",
    "data.cache",
    "data.cache_dir",
    "loader.",
    "checkpoint.",
    "report.",
)


def checkpoints(run: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return run / "checkpoints"


def save_config(config: DictConfig, overrides: Sequence[str], run: Path) -> None:
    """Write the composed config and what was typed; a resumed run keeps what was typed first."""
    config = config.copy()
    resumed, config.resume = config.resume is not None, None
    try:
        run.mkdir(parents=True, exist_ok=True)
        replace_text(run / CONFIG, OmegaConf.to_yaml(config, resolve=True))
        if not resumed:
            replace_text(run / OVERRIDES, yaml.safe_dump(list(overrides), allow_unicode=True))
    except OSError as error:
        raise SegFitError(f"cannot write to the run folder {run}: {error.strerror}.") from error


def claim(run: Path, *, resumed: bool) -> None:
    """Take a run's folder for this process, so that no other one writes into it.

    Of processes that train together, only the first takes it.

    Raises:
        SegFitError: if another process trains in it, a new run would write into an older one, or a link in it
            leads elsewhere.
    """
    if launched().rank > 0:
        return
    locks.lock(run)
    if not resumed and (run / CONFIG).exists():
        shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
        raise SegFitError(
            f"hydra.run.dir={shown} holds a run already. To go on with it: resume={shown}; for a new run give "
            f"another folder, or none."
        )
    refuse_links(run, _WRITTEN)


def load_config(run: Path) -> DictConfig:
    """Read a run's config into the schema.

    Raises:
        SegFitError: if the folder is no run, or its config holds anything but values of the schema.
    """
    path = run / CONFIG
    try:
        values = read_yaml(path)
    except FileNotFoundError as error:
        raise SegFitError(
            f"{run}: no run folder (it has no {CONFIG}). Give a folder that train.py made."
        ) from error
    try:
        schema = schema_of(values["task"]["name"])
        config = OmegaConf.structured(schema.Run)
        for group, schemas in schema.GROUPS.items():
            name = values[group]["name"]
            if name not in schemas:
                raise SegFitError(f"{path}: {group}.name={name} is none of {', '.join(schemas)}.")
            config[group] = OmegaConf.structured(schemas[name])
        config = OmegaConf.merge(config, values)
    except (OmegaConfBaseException, LookupError, TypeError, ValueError, OverflowError) as error:
        reason = f"{getattr(error, 'full_key', '') or ''}: {error}".lstrip(": ").splitlines()[0]
        raise SegFitError(f"{path}: no config of this version of SegFit ({reason}).") from error
    assert isinstance(config, DictConfig)
    try:
        check(config)
    except SegFitError as error:
        raise SegFitError([f"{path}: {problem}" for problem in error.problems]) from error
    return config


def may_change(key: str) -> bool:
    """Say whether an option, by its dotted key, may change when a run goes on."""
    return key == "resume" or any(
        key.startswith(name) if name[-1] == "." else key == name for name in _RESUMABLE
    )


def resumed_config(run: Path, overrides: Sequence[str]) -> DictConfig:
    """Return a run's config with what may change of it, as typed beside `resume=`.

    Raises:
        SegFitError: if something else is to change, or the run cannot be read.
    """
    config = load_config(run)
    problems = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key == "resume":
            continue
        if not may_change(key):
            problems.append(
                f"{override.input_line}: cannot change when a run goes on, it would be another run. What can: "
                f"{', '.join(name + '*' if name[-1] == '.' else name for name in _RESUMABLE)}."
            )
            continue
        try:
            OmegaConf.update(config, key, override.value())
        except OmegaConfBaseException as error:
            problems.append(f"{override.input_line}: {str(error).splitlines()[0]}")
    if problems:
        raise SegFitError(problems)
    check(config)
    config.resume = str(run)
    return config


def discard_if_empty(run: Path) -> None:
    """Remove a run folder in which nothing was written, after wrong input."""
    if {entry.name for entry in run.glob("*")} <= {locks.LOCK, locks.OWNER}:
        locks.release(run)
    with contextlib.suppress(OSError):
        run.rmdir()
        run.parent.rmdir()  # the day's, if this was its only run
