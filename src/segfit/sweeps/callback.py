"""A sweep from its start, when its folder and record are made, to the leader board at its end."""

import contextlib
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict, read_write

from segfit.config.tasks import monitor_mode
from segfit.errors import SegFitError, quoted
from segfit.report.page import sweep_page
from segfit.report.text import hydra_override, shown_path
from segfit.runs import folder as runs
from segfit.runs import lock as locks
from segfit.runs.files import RunFolder
from segfit.sweeps.job import TERMINATED, is_grid
from segfit.sweeps.leaderboard import Row, collect, print_leaderboard, write_csv
from segfit.sweeps.record import SWEEP, save_sweep

_PATIENCE_S = 600.0  # for jobs that are to end; saving takes seconds


def is_sweep() -> bool:
    """Return whether Hydra runs this as one job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


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
            locks.lock(folder)
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
    print_leaderboard(rows)
    written = str(folder / "leaderboard.csv")
    try:
        write_csv(rows, folder / "leaderboard.csv")
    except OSError as error:  # Hydra would log a warning and ignore the failures
        written += f": cannot be written ({error.strerror})."
    else:
        with contextlib.suppress(OSError):
            pages = {str(row.job): RunFolder(row.path).page for row in rows}
            there = {job: page for job, page in pages.items() if page.exists()}
            if there:
                (folder / "report.html").write_text(
                    sweep_page(folder, folder / "leaderboard.csv", there), encoding="utf-8"
                )
                written += f"\n{folder / 'report.html'}"
    if any(RunFolder(row.path).tensorboard.exists() for row in rows):
        written += f"\ntensorboard --logdir {folder}"
    print(written)
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
        package = str(config.hydra[kind]["_target_"]).rpartition(".")[0]
        found = None
        with contextlib.suppress(ModuleNotFoundError):
            found = find_spec(package)
        if found is None:
            choice = f"hydra/{kind}={config.hydra.runtime.choices[f'hydra/{kind}']}"
            raise SegFitError(f"{choice}: not installed. pip install -r requirements-sweeps.txt")


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
