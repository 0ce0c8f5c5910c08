"""The run folder: what was trained, and all that resuming and evaluating need. It may be untrusted.

One process at a time works in a folder: it holds a lock that ends with it, however it ends.
"""

import contextlib
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from segfit.config.check import check, flat, plain
from segfit.config.tasks import run_folder, schema_of
from segfit.errors import SegFitError, nearest, raise_all
from segfit.runs.files import RunFolder, read_yaml
from segfit.system.files import replace_text, reporting
from segfit.system.process import launched

_WRONG = (OmegaConfBaseException, LookupError, TypeError, ValueError, OverflowError, RecursionError)
# What may change when a run is resumed; anything else would make it another run.
_RESUMABLE = ("batch_size", "accumulate", "epochs", "max_steps", "max_left_out", "patience", "val_every",
              "limit_val_batches", "device", "compile", "compile_mode", "data.root", "data.check", "data.on_bad_sample",
              "data.cache", "data.cache_dir", "loader.", "checkpoint.", "metrics.", "report.")  # fmt: skip
LOCK, OWNER = ".lock", ".lock-owner"
_held: dict[Path, FileLock] = {}


def save_config(
    config: DictConfig | None, overrides: Sequence[str], run: Path, *, resumed: bool = False
) -> None:
    """Write what was typed, for a new run, and the composed config; raise a SegFitError if they cannot be written."""
    with reporting(f"cannot write to the run folder {run}"):
        if not resumed:
            text = yaml.safe_dump(list(overrides), allow_unicode=True)
            replace_text(RunFolder(run).overrides, text)
        if config is not None:
            replace_text(RunFolder(run).config, OmegaConf.to_yaml(config, resolve=True))


def claim(run: Path, *, resumed: bool) -> None:
    """Lock a run's folder for this process; of torchrun's processes, for the first.

    Raises a SegFitError if another process trains in it, or a new run would write into an older one.
    """
    if launched().rank > 0:
        return
    lock(run)
    if not resumed and RunFolder(run).config.exists():
        shown = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
        raise SegFitError(
            f"{shown} holds a run already. To resume it: resume={shown}; for a new run give another name= (or "
            f"hydra.run.dir=), or none."
        )


def load_config(run: Path) -> DictConfig:
    """Read a run's config into the schema; raise a SegFitError if it holds anything else, or there is no run."""
    path = RunFolder(run).config
    try:
        values = read_yaml(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SegFitError(
            f"{run}: no run folder (it has no {path.name}). Give a folder that train.py made; a checkpoint needs the "
            f"{path.name} of its run."
        ) from error
    try:
        schema = schema_of(values["task"]["name"])
        config = OmegaConf.structured(schema.Run)
        for group, schemas in schema.GROUPS.items():
            config[group] = OmegaConf.structured(schemas[values[group]["name"]])
        config = OmegaConf.merge(config, values)
    except _WRONG as error:
        reason = f"{getattr(error, 'full_key', '') or ''}: {error}".lstrip(": ").splitlines()[0]
        raise SegFitError(f"{path}: no config of this version of SegFit ({reason}).") from error
    assert isinstance(config, DictConfig)
    try:
        check(config, recorded=True)
    except SegFitError as error:
        raise SegFitError([f"{path}: {problem}" for problem in error.problems]) from error
    return config


def load_named(options: DictConfig) -> list[DictConfig]:
    """Read the configs of the runs that evaluate.py's options name, by their folders or files in them; raises as `load_config`.

    `options.run` becomes a list of their folders, `options.checkpoint` the one that is named.
    """
    named = list(options.run) if OmegaConf.is_list(options.run) else [options.run]
    for given in (path for run in named if (path := Path(f"{run}")).suffix == ".pt"):
        if given.stem not in ("best", "last"):
            raise SegFitError(f"run={given}: give the run's folder, its best.pt or its last.pt.")
        options.checkpoint = given.stem
    options.run = [str(run_folder(f"{run}")) for run in named]
    return [load_config(Path(folder)) for folder in options.run]


def may_change(key: str) -> bool:
    """Return whether an option, by its dotted key, may change when a run is resumed."""
    section = "".join(key.partition(".")[:2])
    return key == "resume" or key in _RESUMABLE or section in _RESUMABLE


def resumed_config(run: Path, overrides: Sequence[str]) -> DictConfig:
    """Return a run's config, changed by the overrides beside `resume=`.

    Raises a SegFitError if an override is not allowed, or the run cannot be read.
    """
    config = load_config(run)
    problems = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if key == "resume":
            continue
        if not may_change(key):
            problems.append(
                f"{(override.input_line or '').lstrip('+')}: cannot change when a run is resumed, it would be another run. What can: "
                f"{', '.join(name + '*' if name[-1] == '.' else name for name in _RESUMABLE)}."
            )
            continue
        try:
            OmegaConf.update(config, key, override.value())
        except (ConfigKeyError, ConfigAttributeError):
            near = nearest(key, list(flat(plain(config))))
            problems.append(f"{key}: there is no such key.{near}")
        except OmegaConfBaseException as error:
            problems.append(f"{key}: {str(error).splitlines()[0]}")
    raise_all(problems)
    check(config, recorded=True)
    return config


def discard_if_empty(run: Path) -> None:
    """Remove a run folder in which nothing was written."""
    if {entry.name for entry in run.glob("*")} <= {LOCK, OWNER}:
        release(run)
    with contextlib.suppress(OSError):
        run.rmdir()
        run.parent.rmdir()  # the day's, if this was its only run


class InUseError(SegFitError):
    """Another process works in the folder."""


def lock(folder: Path) -> None:
    """Lock a folder for the rest of this process's life; the system unlocks it, after SIGKILL too.

    Continues without a lock where it is not possible: a read-only folder, a network file system without locks. Raises an
    InUseError, which names the other process, if that has locked it.
    """
    place = folder.resolve()
    if place in _held:
        return
    own = FileLock(place / LOCK, timeout=0.2)  # `holder` locks it for a moment too
    try:
        own.acquire()
    except Timeout:
        raise InUseError(
            f"{folder} is in use by {_owner(folder)}. Wait until that is done, or end it; or choose another folder."
        ) from None
    except (OSError, NotImplementedError):  # a file system without locks: train without one
        return
    _held[place] = own
    with contextlib.suppress(OSError):  # a full disk: the lock holds, but without a name
        (place / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")


def holder(folder: Path) -> str | None:
    """Return which other process has locked a folder ("process 123 on host"); None: no other."""
    place = folder.resolve()
    if place in _held or not (place / LOCK).exists():
        return None
    try:
        with FileLock(place / LOCK, timeout=0.1):
            return None
    except Timeout:
        return _owner(folder)
    except (OSError, NotImplementedError):  # a file system without locks
        return None


def release(folder: Path) -> None:
    """Unlock a folder that this process has locked, and remove the lock's files."""
    own = _held.pop(folder.resolve(), None)
    if own is not None:
        own.release()
        for name in (LOCK, OWNER):
            (folder / name).unlink(missing_ok=True)


def _owner(folder: Path) -> str:
    """Return who wrote down that it has the lock: not in the lock's own file, which Windows lets nobody read."""
    try:
        text = (folder / OWNER).read_text(errors="replace")[:200].strip()
    except OSError:
        text = ""
    return "".join(c for c in text if c.isprintable()) or "another process"
