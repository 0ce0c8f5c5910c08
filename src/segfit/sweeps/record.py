"""What a sweep is, written at its start, so that it can be launched again after it was killed.

    sweep.yaml   format: 1
                 overrides: what was typed, sweeps and all
                 launcher, sweeper: names
                 settings: numbers of the two, such as launcher.n_jobs
                 retype: other settings of Hydra's that were typed; a name each, their values are not kept

A sweep's folder may come from a stranger. So nothing of the record can name a class, a path to a config or a
command: such settings have to be typed again by whoever launches it again.
"""

import math
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig

from segfit.errors import SegFitError
from segfit.runs.untrusted import read_yaml
from segfit.sweeps.job import quoted, state_of
from segfit.system.files import replace_text

SWEEP = "sweep.yaml"
_FORMAT = 1
_MOST_JOBS = 100_000
_FIELDS = {"format", "overrides", "launcher", "sweeper", "settings", "retype"}
_KEY = re.compile(r"[a-z]\w*(\.\w+)*")
_SETTING = re.compile(r"(launcher|sweeper)(\.[a-z]\w*)+")
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?")
_OWN = ("hydra.mode", "hydra.sweep.dir", "hydra/launcher", "hydra/sweeper")


def save_sweep(config: DictConfig, folder: Path) -> None:
    """Write the record of a sweep.

    Args:
        config: composed, with Hydra's own.
        folder: the sweep's.

    Raises:
        SegFitError: if it cannot be written.
    """
    settings: dict[str, float] = {}
    retype: list[str] = []
    for text in config.hydra.overrides.hydra:
        key, _, value = str(text).lstrip("+").partition("=")
        name = key.removeprefix("hydra.")
        if _SETTING.fullmatch(name) and _NUMBER.fullmatch(value):
            settings[name] = yaml.safe_load(value) if value.lstrip("-").isdigit() else float(value)
        elif key not in _OWN:
            retype.append(key)
    if any(source.provider == "command-line" for source in config.hydra.runtime.config_sources):
        retype.append("--config-dir")
    choices = config.hydra.runtime.choices
    record = {
        "format": _FORMAT,
        "overrides": list(config.hydra.overrides.task),
        "launcher": str(choices["hydra/launcher"]),
        "sweeper": str(choices["hydra/sweeper"]),
        "settings": settings,
        "retype": retype,
    }
    try:
        replace_text(folder / SWEEP, yaml.safe_dump(record, allow_unicode=True, sort_keys=False))
    except OSError as error:
        raise SegFitError(
            f"cannot write to the sweep's folder {folder}: {error.strerror}."
        ) from error


def resumed_arguments(arguments: Sequence[str]) -> tuple[list[str], Path] | None:
    """Return the command line that launches a sweep again, and its folder; None without `resume_sweep=`.

    Args:
        arguments: of train.py, without the program's name.

    Raises:
        SegFitError: if the folder holds no sweep, nothing of it is missing, or something else is to change.
    """
    given = [text for text in arguments if text.startswith("resume_sweep=")]
    if not given:
        return None
    folder = _folder(given[-1])
    record = _read_record(folder)
    overrides = _checked(record["overrides"], folder / SWEEP)
    rest = [text for text in arguments if text not in given and text not in ("-m", "--multirun")]
    flags, typed = _split(rest)
    _refuse_changes(typed)
    _refuse_forgotten(record["retype"], [*typed, *flags], folder)
    _refuse_complete(record, overrides, folder)
    settings = [f"hydra.{key}={value}" for key, value in record["settings"].items()]
    engines = [f"hydra/{kind}={record[kind]}" for kind in ("launcher", "sweeper")]
    own = f"hydra.sweep.dir={quoted(folder)}"
    texts = [str(override.input_line) for override in overrides]
    return [*texts, *engines, *settings, *typed, own, "-m", *flags], folder


def _folder(text: str) -> Path:
    try:
        value = OverridesParser.create().parse_override(text).value()
    except HydraException as error:
        raise SegFitError(f"{text}: not understood. Quote the folder: resume_sweep='…'.") from error
    return Path(str(value)).expanduser()


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / SWEEP
    try:
        record = read_yaml(path)
    except FileNotFoundError as error:
        what = f"it has no {SWEEP}" if folder.is_dir() else "there is no such folder"
        raise SegFitError(
            f"resume_sweep={folder}: no sweep ({what}). Give a folder that train.py -m made, such as "
            f"multirun/2030-01-31/12-00-00."
        ) from error
    shapes = {"overrides": list, "launcher": str, "sweeper": str, "settings": dict, "retype": list}
    whole = isinstance(record, dict) and set(record) == _FIELDS and record["format"] == _FORMAT
    if not whole or not all(isinstance(record[key], kind) for key, kind in shapes.items()):
        raise SegFitError(f"{path}: not the record of a sweep of this version of SegFit.")
    _check_engines(record, path)
    return dict(record)


def _check_engines(record: dict[str, Any], path: Path) -> None:
    names = [record["launcher"], record["sweeper"]]
    bad = [name for name in names if not re.fullmatch(r"\w+", name)]
    for key, value in record["settings"].items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not isinstance(key, str) or not _SETTING.fullmatch(key):
            bad.append(f"{key}={value}")
    bad += [str(key) for key in record["retype"] if not isinstance(key, str)]
    if bad:
        raise SegFitError(f"{path}: refused, {', '.join(map(repr, bad))} is no setting of a sweep.")


def _checked(texts: list[Any], path: Path) -> list[Override]:
    """Parse a record's overrides; refuse those that could bring in more than values of the schema."""
    overrides = []
    for text in texts:
        try:
            if not isinstance(text, str):
                raise TypeError(text)
            override = OverridesParser.create().parse_override(text)
        except (HydraException, TypeError, RecursionError) as error:
            raise SegFitError(f"{path}: {str(text)[:200]!r} is no override.") from error
        key = override.key_or_group
        plain = override.type == OverrideType.CHANGE and override.package is None
        if (
            not plain
            or not _KEY.fullmatch(key)
            or key.split(".")[0] in ("hydra", "resume", "resume_sweep")
        ):
            raise SegFitError(
                f"{path}: refused, {text!r}: a sweep goes on with plain key=value only. Launch it anew."
            )
        # A choice that holds a path would load a YAML file from anywhere.
        value = text.partition("=")[2]
        if "." not in key and ("/" in value or "\\" in value):
            raise SegFitError(f"{path}: refused, {text!r}: no choice of {key} is a path.")
        overrides.append(override)
    return overrides


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return flags (with the values that follow them) and overrides."""
    flags: list[str] = []
    overrides: list[str] = []
    for text in arguments:
        takes_value = bool(flags) and flags[-1].startswith("--config") and "=" not in flags[-1]
        if text.startswith("-") or (takes_value and "=" not in text):
            flags.append(text)
        else:
            overrides.append(text)
    return flags, overrides


def _refuse_changes(typed: Sequence[str]) -> None:
    wrong = [text for text in typed if not text.lstrip("+~").startswith(("hydra/", "hydra."))]
    if wrong:
        raise SegFitError(
            [
                f"{text}: cannot change when a sweep goes on, it would be another sweep. What can: how it is "
                f"launched (hydra/launcher=…, hydra.launcher.…=…)."
                for text in wrong
            ]
        )


def _refuse_forgotten(retype: Sequence[str], given: Sequence[str], folder: Path) -> None:
    if "hydra.sweeper.storage" in retype:
        raise SegFitError(
            f"resume_sweep={folder}: its search is kept in hydra.sweeper.storage=… and goes on from there: launch "
            f"it again with the same storage and hydra.sweeper.study_name."
        )
    texts = [text.lstrip("+") for text in given]
    missing = [key for key in retype if not any(re.split("[= ]", text)[0] == key for text in texts)]
    if missing:
        raise SegFitError(
            f"resume_sweep={folder}: it was launched with {', '.join(missing)}. What names programs or places is "
            f"not taken from a folder: type it again, beside resume_sweep=."
        )


def _refuse_complete(record: dict[str, Any], overrides: Sequence[Override], folder: Path) -> None:
    """Refuse a sweep of which every job is done, where it is known how many it has."""
    if record["sweeper"] != "basic":
        return
    count = math.prod(_count(override) for override in overrides)
    if count > _MOST_JOBS:
        raise SegFitError(f"{folder / SWEEP}: refused, it has more than {_MOST_JOBS} jobs.")
    if all(state_of(folder / str(job)) == "done" for job in range(count)):
        raise SegFitError(
            f"resume_sweep={folder}: nothing is missing, all {count} jobs are done. Their scores are in "
            f"{folder / 'leaderboard.csv'}."
        )


def _count(override: Override) -> int:
    if not override.is_sweep_override() or not override.is_discrete_sweep():
        return 1
    return sum(1 for _ in islice(override.sweep_string_iterator(), _MOST_JOBS + 1))
