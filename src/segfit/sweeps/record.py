"""The record of a sweep: what was typed, so that `resume_sweep=<folder>` can launch it again.

    sweep.yaml   overrides: of our options, sweeps included
                 hydra: of Hydra's, such as hydra/launcher=joblib

The folder may be untrusted, so only plain values are taken from it: what could name a class, a file or a command has
to be typed again.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from segfit.errors import SegFitError, quoted
from segfit.runs.files import read_yaml
from segfit.sweeps.job import config_flags
from segfit.system.files import replace_text, reporting

SWEEP = "sweep.yaml"
_KEY = re.compile(r"(?!(hydra|resume|resume_sweep)\b)[a-z]\w*(\.\w+)*")
_CHOICES = re.compile(r"[\w-]+(/[\w-]+)?(,[\w-]+(/[\w-]+)?)*")
_NUMBER = r"-?\d+(\.\d+)?(e-?\d+)?"
_HYDRAS = re.compile(
    rf"hydra/(launcher|sweeper)=\w+|hydra\.(launcher|sweeper)(\.[a-z]\w*)+={_NUMBER}"
)


def save_sweep(config: DictConfig, folder: Path) -> bool:
    """Write the record of a sweep, or compare it with the one in the folder; return whether it is new.

    Raises a SegFitError if the folder holds another sweep, or cannot be written to.
    """
    typed = config.hydra.overrides
    if (folder / SWEEP).exists():
        before = _read(folder)["overrides"]
        if before != list(typed.task):
            raise SegFitError(
                f"hydra.sweep.dir={folder} holds another sweep ({' '.join(before)}). To resume that one: "
                f"python train.py resume_sweep={folder}; for a new sweep give another folder, or none."
            )
        return False
    own = ("hydra.mode=", "hydra.sweep.dir=")
    hydras = [text for text in typed.hydra if not text.startswith(own)]
    record = {"overrides": list(typed.task), "hydra": hydras + config_flags(config.hydra)}
    with reporting(f"cannot write to the sweep's folder {folder}"):
        replace_text(folder / SWEEP, yaml.safe_dump(record, allow_unicode=True, sort_keys=False))
    return True


def resumed_arguments(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the sweep's record in place of `resume_sweep=<folder>`, if there is one.

    Raises a SegFitError if the folder holds no sweep, or something has to be typed again.
    """
    given = next((text for text in arguments if text.startswith("resume_sweep=")), None)
    if given is None:
        return list(arguments)
    place = arguments.index(given)
    before, after = arguments[:place], arguments[place + 1 :]
    try:
        value = OverridesParser.create().parse_override(given).value()
    except HydraException as error:
        hint = "not understood. Quote the folder: resume_sweep='…'."
        raise SegFitError(f"{given}: {hint}") from error
    folder = Path(str(value)).expanduser()
    record = _read(folder)
    typed = {_key(text) for text in (*before, *after)}
    hydras = [text for text in record["hydra"] if _key(text) not in typed]
    unsafe = [_key(text) for text in hydras if not _HYDRAS.fullmatch(text)]
    if "hydra.sweeper.storage" in unsafe:
        raise SegFitError(
            f"resume_sweep={folder}: its search is kept in hydra.sweeper.storage=… and continues from there: launch "
            f"it again with the same storage and hydra.sweeper.study_name."
        )
    if unsafe:
        raise SegFitError(
            f"resume_sweep={folder}: it was launched with {', '.join(unsafe)}. What names programs or places is not "
            f"taken from a folder: type it again, beside resume_sweep=."
        )
    for text in record["overrides"]:
        if not _is_value(text):
            raise SegFitError(
                f"{folder / SWEEP}: refused, {text[:200]!r}: only plain key=value is taken from a sweep's folder. Type the "
                f"whole command again, with hydra.sweep.dir={folder}."
            )
    own = (f"hydra.sweep.dir={quoted(folder)}", "hydra.mode=MULTIRUN")
    return [*before, *record["overrides"], *hydras, *own, *after]


def _key(text: str) -> str:
    return re.split("[= ]", text.lstrip("+"))[0]


def _read(folder: Path) -> dict[str, list[str]]:
    try:
        record = read_yaml(folder / SWEEP)
    except FileNotFoundError as error:
        what = f"it has no {SWEEP}" if folder.is_dir() else "there is no such folder"
        raise SegFitError(
            f"resume_sweep={folder}: no sweep ({what}). Give a folder that train.py -m made, such as "
            f"multirun/2030-01-31/12-00-00."
        ) from error
    whole = isinstance(record, dict) and set(record) == {"overrides", "hydra"}
    lists = list(record.values()) if whole else [None]
    if not all(
        isinstance(one, list) and all(isinstance(text, str) for text in one) for one in lists
    ):
        raise SegFitError(f"{folder / SWEEP}: not the record of a sweep of this version of SegFit.")
    return dict(record)


def _is_value(text: str) -> bool:
    """Return whether an override of a record brings in no more than values of the schema."""
    key, equals, value = text.partition("=")
    # A choice that is a path would load a YAML file from anywhere; those of a task are in a folder of its name.
    file = "." not in key and re.search(r"[/\\]", value) and not _CHOICES.fullmatch(value)
    return bool(equals and _KEY.fullmatch(key) and not file)
