"""Sweeps: every job is a process of its own, so that what kills one cannot touch the next."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from segfit.report.leaderboard import collect, print_leaderboard, write_csv
from segfit.runs import METRICS, OVERRIDES

ERROR = "error.json"
_INTERRUPTED = 130
_TERMINATED = 143
_ENVIRONMENT = dict(os.environ)  # as the person set it; what the parent adds is not for its jobs
_JOB_FOLDER = "SEGFIT_JOB_FOLDER"  # set for the processes of a sweep
# Of the sweep itself; a job must not sweep again, and has its own folder.
_SWEEP_ONLY = ("hydra.mode", "hydra.run", "hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra/sweeper",
               "hydra/launcher")  # fmt: skip


def is_sweep() -> bool:
    """Say whether Hydra runs this as one job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def run_job(monitor: str) -> float:
    """Run this job of a sweep in a process of its own; return its best score.

    A job that fails leaves `error.json` in its folder and scores NaN; the sweep goes on.

    Raises:
        KeyboardInterrupt: if the job was ended by Ctrl-C, which ends the sweep.
        SystemExit: if the sweep was ended by SIGTERM, once the job has saved.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = list(hydra.overrides.task)
    (folder / OVERRIDES).write_text(yaml.safe_dump(overrides, allow_unicode=True))
    print(f"\n── job {hydra.job.num}: {' '.join(overrides) or 'as it is'}", flush=True)
    code = _run(_command(hydra, overrides, folder), {**_ENVIRONMENT, _JOB_FOLDER: str(folder)})
    if code == _INTERRUPTED:
        raise KeyboardInterrupt
    if code != 0 and not (folder / ERROR).exists():
        write_error(folder, "crash", _how_it_ended(code), code)
    return best_score(folder, monitor)


def _command(hydra: Any, overrides: Sequence[str], folder: Path) -> list[str]:
    kept = [text for text in hydra.overrides.hydra if not text.lstrip("+~").startswith(_SWEEP_ONLY)]
    own = [f"hydra.run.dir='{folder.as_posix()}'", "hydra.mode=RUN"]
    extra = [
        f"--config-dir={source.path}"
        for source in hydra.runtime.config_sources
        if source.provider == "command-line"
    ]
    script = str(Path(sys.argv[0]).resolve())
    return [
        sys.executable,
        script,
        f"--config-name={hydra.job.config_name}",
        *extra,
        *overrides,
        *kept,
        *own,
    ]


def _run(command: list[str], environment: dict[str, str]) -> int:
    process = subprocess.Popen(command, env=environment)
    stopped = False

    def hand_on(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, hand_on)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the job got the signal too, and saves
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if stopped:
        sys.exit(_TERMINATED)
    return code


def _how_it_ended(code: int) -> str:
    if code < 0:
        return f"killed by signal {-code}" + (" (out of host memory?)" if code == -9 else "")
    return "wrong input, see above" if code == 2 else f"ended with exit code {code}, see above"


def leave_error(kind: str, message: str, exit_code: int) -> None:
    """If this process is a job of a sweep, leave why it failed in its folder, for the leader board."""
    folder = os.environ.get(_JOB_FOLDER)
    if folder is not None:
        write_error(Path(folder), kind, message, exit_code)


def write_error(folder: Path, kind: str, message: str, exit_code: int) -> None:
    """Leave the reason of a failure in a job's folder."""
    content = {"kind": kind, "message": message, "exit_code": exit_code}
    with contextlib.suppress(OSError):
        (folder / ERROR).write_text(json.dumps(content), encoding="utf-8")


def best_score(folder: Path, monitor: str) -> float:
    """Return a finished job's best monitored score, NaN if there is none."""
    try:
        metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
        return float(metrics["best"][monitor])
    except (OSError, ValueError, KeyError, TypeError):
        return float("nan")


class LeaderBoard(Callback):
    """Hydra's callback that ends a sweep with its jobs in order, on screen and as CSV."""

    failed = 0

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the leader board and write it beside the jobs."""
        folder = Path(config.hydra.sweep.dir)
        rows = collect(folder)
        print_leaderboard(rows)
        write_csv(rows, folder / "leaderboard.csv")
        print(f"{folder / 'leaderboard.csv'}\ntensorboard --logdir {folder}")
        LeaderBoard.failed = sum((job / ERROR).exists() for job in folder.iterdir() if job.is_dir())
