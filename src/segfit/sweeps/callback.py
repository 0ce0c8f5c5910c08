"""A sweep from its start, when its folder and record are made, to the leader board at its end.

The record is what was typed, so that `resume_sweep=<folder>` can launch it again:

    sweep.yaml   overrides: of our options, sweeps included
                 hydra: of Hydra's, such as hydra/launcher=joblib

The folder may be untrusted, so only plain values are taken from it: what could name a class, a file or a command has
to be typed again.
"""

import contextlib
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, open_dict, read_write

from segfit.config.tasks import monitor_mode
from segfit.errors import SegFitError, quoted
from segfit.report.page import sweep_page
from segfit.report.text import grid, hydra_override, shown_path, stdout_console
from segfit.runs import folder as runs
from segfit.runs.files import RunFolder, read_yaml
from segfit.sweeps.job import TERMINATED, config_flags, is_grid
from segfit.sweeps.leaderboard import Row, board, collect, write_csv
from segfit.system.files import replace_text, reporting

SWEEP = "sweep.yaml"
_KEY = re.compile(r"(?!(hydra|resume|resume_sweep)\b)[a-z]\w*(\.\w+)*")
_CHOICES = re.compile(r"[\w-]+(/[\w-]+)?(,[\w-]+(/[\w-]+)?)*")
_NUMBER = r"-?\d+(\.\d+)?(e-?\d+)?"
_HYDRAS = re.compile(
    rf"hydra/(launcher|sweeper)=\w+|hydra\.(launcher|sweeper)(\.[a-z]\w*)+={_NUMBER}"
)
_PATIENCE_S = 600.0  # for jobs that are to end; saving takes seconds


class RefusedError(BaseException):
    """Carries an error through Hydra, which logs a warning for an Exception in a callback."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class LeaderBoard(Callback):
    """Hydra's callback around a sweep: makes its folder and record, and ends it with the leader board."""

    folder: Path | None = None  # of the sweep that this process launched
    is_new = True  # the folder held no sweep before
    failed = 0  # how many jobs have no result
    interrupted = False  # Ctrl-C ended jobs that were launched side by side

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the record, lock the folder, and handle signals.

        Raises a RefusedError if an engine is not installed, or the folder is in use or another sweep's.
        """
        try:
            _check_installed(config)
            folder = Path(config.hydra.sweep.dir)
            LeaderBoard.is_new = save_sweep(config, folder)
            runs.lock(folder)
            _complete(config, folder)
        except Exception as error:
            raise RefusedError(error) from error
        LeaderBoard.folder = folder
        if config.hydra.runtime.choices["hydra/launcher"] != "basic":
            _end_after_jobs(here="Slurm" not in config.hydra.launcher._target_)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the leader board and write it beside the jobs."""
        rows = show(Path(config.hydra.sweep.dir))
        side_by_side = config.hydra.runtime.choices["hydra/launcher"] != "basic"
        LeaderBoard.interrupted = side_by_side and any(row.status == "interrupted" for row in rows)
        grid = is_grid(config.hydra)  # a search does not repeat what failed
        if LeaderBoard.interrupted or (grid and LeaderBoard.failed):
            print_resume_command()


def show(folder: Path) -> list[Row]:
    """Print the leader board of a sweep's folder and write it there; return its rows."""
    rows = collect(folder)
    LeaderBoard.failed = sum(row.failed for row in rows)
    stdout_console().print(grid(board(rows)))
    table, page = folder / "leaderboard.csv", folder / "report.html"
    pages = {f"{row.job}": path for row in rows if (path := RunFolder(row.path).page).exists()}
    try:
        write_csv(rows, table)
        print(table)
        if pages:
            page.write_text(sweep_page(folder, table, pages), encoding="utf-8")
            print(page)
    except OSError as error:  # Hydra would log a warning and ignore the failures
        print(f"{error.filename}: cannot be written ({error.strerror}).")
    if any(RunFolder(row.path).tensorboard.exists() for row in rows):
        print(f"tensorboard --logdir {folder}")
    return rows


def without_a_result(error: Exception) -> list[str]:
    """Print the leader board of a search in which every trial failed, and return the message; else []."""
    optunas = ("No trials are completed", "Record does not exist")  # in memory, in a storage
    if LeaderBoard.folder is None or not str(error).startswith(optunas):
        return []
    show(LeaderBoard.folder)
    return [f"{LeaderBoard.folder}: no trial has a score; see the leader board."]


def print_resume_command() -> None:
    """Print the command that resumes the sweep, if there is one."""
    if LeaderBoard.folder is not None and (LeaderBoard.folder / SWEEP).exists():
        again = hydra_override("resume_sweep", shown_path(LeaderBoard.folder))
        print(f"To run what is missing: python train.py {again}", flush=True)


def discard_unstarted() -> None:
    """Remove the folder of a new sweep that was refused before a job started."""
    folder = LeaderBoard.folder
    if folder is None or not LeaderBoard.is_new or any(path.is_dir() for path in folder.iterdir()):
        return
    for name in (SWEEP, "multirun.yaml"):  # the record, and Hydra's own
        (folder / name).unlink(missing_ok=True)
    runs.discard_if_empty(folder)


def _check_installed(config: DictConfig) -> None:
    for kind in ("launcher", "sweeper"):
        try:
            import_module(config.hydra[kind]["_target_"].rpartition(".")[0])
        except ModuleNotFoundError as error:
            choice = f"hydra/{kind}={config.hydra.runtime.choices[f'hydra/{kind}']}"
            how = "pip install -r requirements-sweeps.txt"
            raise SegFitError(f"{choice}: not installed. {how}") from error


def _complete(config: DictConfig, folder: Path) -> None:
    """Give the jobs the folder, which processes without our resolvers could not make up, and a search its direction."""
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(folder)}")
        if "direction" in config.hydra.sweeper:
            config.hydra.sweeper.direction = f"{monitor_mode(config)}imize"


def _end_after_jobs(*, here: bool) -> None:
    """Let Ctrl-C and SIGTERM end this process once its jobs have saved; launchers would kill the jobs.

    Where the jobs run `here`, on this machine, a terminal sends Ctrl-C to each of them: this process and the launcher's,
    which inherit that, ignore it and end with the jobs.
    """

    def terminate(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        this = psutil.Process()
        launchers = this.children()
        jobs = [child for child in this.children(recursive=True) if child not in launchers]
        for launcher in launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                launcher.terminate()
        psutil.wait_procs(jobs, timeout=_PATIENCE_S)
        sys.exit(TERMINATED)

    if here:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)


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
