"""Sweeps: from the start, where the folder and its record are made, to the leader board at the end."""

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

from segfit.errors import SegFitError
from segfit.report.text import hydra_override, shown_path
from segfit.runs import folder as runs
from segfit.runs import lock as locks
from segfit.runs.untrusted import refuse_links
from segfit.sweeps.job import TERMINATED, is_grid, quoted
from segfit.sweeps.leaderboard import Row, collect, print_leaderboard, write_csv
from segfit.sweeps.record import SWEEP, save_sweep

_PATIENCE_S = 600.0  # for jobs that were told to end; saving takes seconds


def is_sweep() -> bool:
    """Say whether Hydra runs this as one job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


class RefusedError(BaseException):
    """Carries an error through Hydra, which turns what is an Exception in a callback into a warning."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class LeaderBoard(Callback):
    """Hydra's callback that begins a sweep with a folder of its own and ends it with its jobs in order.

    Attributes:
        folder: of the sweep that this process launched; None before.
        resumed: of the sweep that is launched again; None: a new one.
        failed: how many jobs have no result.
        interrupted: whether Ctrl-C ended jobs that were launched side by side.
    """

    folder: Path | None = None
    resumed: Path | None = None
    failed = 0
    interrupted = False

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Take the folder, write down what the sweep is, and take care of signals.

        Raises:
            RefusedError: if an engine is not installed, or the folder is another sweep's.
        """
        try:
            _check_installed(config)
            folder = Path(config.hydra.sweep.dir)
            _claim(folder, resumed=folder == LeaderBoard.resumed)
            if folder != LeaderBoard.resumed:
                save_sweep(config, folder)
            _pin(config, folder)
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
        grid = is_grid(config.hydra)  # a search does not try again what failed
        if LeaderBoard.interrupted or (grid and LeaderBoard.failed):
            tell_how_to_go_on()


def show(folder: Path) -> list[Row]:
    """Print the leader board of a sweep's folder and write it there; return it."""
    rows = collect(folder)
    LeaderBoard.failed = sum(row.failed for row in rows)
    print_leaderboard(rows)
    written = str(folder / "leaderboard.csv")
    try:
        write_csv(rows, folder / "leaderboard.csv")
    except OSError as error:  # Hydra would make a warning of it, and the exit code be that of a sweep without failures
        written += f": cannot be written ({error.strerror})."
    print(f"{written}\ntensorboard --logdir {folder}")
    return rows


def without_a_result(error: Exception) -> list[str]:
    """Return what to tell of a search in which every trial failed, after its leader board; else []."""
    optunas = ("No trials are completed", "Record does not exist")  # in memory, in a storage
    if LeaderBoard.folder is None or not str(error).startswith(optunas):
        return []
    show(LeaderBoard.folder)
    return [f"{LeaderBoard.folder}: no trial has a score; the leader board says why."]


def tell_how_to_go_on() -> None:
    """Print what to type to run what is missing of a sweep; nothing if there is none."""
    if LeaderBoard.folder is not None and (LeaderBoard.folder / SWEEP).exists():
        again = hydra_override("resume_sweep", shown_path(LeaderBoard.folder))
        print(f"What is missing runs with: python train.py {again}", flush=True)


def discard_unbegun() -> None:
    """Remove the folder of a new sweep that was refused before a job began, so that nothing of it is missing."""
    folder = LeaderBoard.folder
    if folder is None or folder == LeaderBoard.resumed:
        return
    if not any(entry.is_dir() for entry in folder.iterdir()):
        for name in (SWEEP, "multirun.yaml"):  # the record, and Hydra's own
            (folder / name).unlink(missing_ok=True)
        runs.discard_if_empty(folder)


def _check_installed(config: DictConfig) -> None:
    for kind in ("launcher", "sweeper"):
        package = str(config.hydra[kind]["_target_"]).rpartition(".")[0]
        try:
            found = find_spec(package) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise SegFitError(
                f"hydra/{kind}={config.hydra.runtime.choices[f'hydra/{kind}']}: not installed. "
                f"pip install -r requirements-sweeps.txt"
            )


def _claim(folder: Path, *, resumed: bool) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SegFitError(f"cannot make the folder {folder}: {error.strerror}.") from error
    locks.lock(folder)
    if not resumed and ((folder / SWEEP).exists() or (folder / "0").exists()):
        raise SegFitError(
            f"hydra.sweep.dir={folder} holds a sweep already. To run what is missing of it: "
            f"python train.py resume_sweep={folder}; for a new sweep give another folder, or none."
        )
    refuse_links(folder, [entry.name for entry in folder.iterdir()])  # it may be a stranger's


def _pin(config: DictConfig, folder: Path) -> None:
    """Give the jobs the folder as it is: they may be composed in processes that know no resolver of ours."""
    with read_write(config), open_dict(config):
        config.hydra.sweep.dir = str(folder)
        config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(folder)}")


def _end_after_jobs(*, here: bool) -> None:
    """Let Ctrl-C and SIGTERM end this process once its jobs have saved: launchers would kill them.

    Args:
        here: whether the jobs run on this machine, where a terminal sends Ctrl-C to each of them. Then the
            processes in between ignore it, as they inherit from this one, and come to their end with the jobs.
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
