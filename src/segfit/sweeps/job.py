"""A job of a sweep: a process of its own, so that one that is killed does not affect the others."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig

from segfit.errors import SegFitError, quoted
from segfit.runs import folder as runs
from segfit.runs.files import COMPLETE, RunFolder, read_json, read_yaml
from segfit.sweeps.leaderboard import read_job
from segfit.system.files import replace_text
from segfit.system.hardware import available_cores
from segfit.system.process import STOPPING

INTERRUPTED = 130
TERMINATED = 143
QUIET = "SEGFIT_QUIET_ERRORS"  # set where HYDRA_FULL_ERROR=1 is ours and not the person's
_JOB_FOLDER = "SEGFIT_JOB_FOLDER"  # set for the processes of a sweep
# Hydra's options that only the sweep gets; a job must not sweep again, and has its own folder.
_SWEEP_ONLY = ("hydra.mode", "hydra.run", "hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra/sweeper",
               "hydra/launcher")  # fmt: skip
_ENDING = STOPPING - {signal.SIGINT, getattr(signal, "SIGHUP", None)}  # what a scheduler sends
_stopped = False
# The plugins' schemas do validate conf/hydra/launcher, as intended. Here, since the launchers' processes compose too,
# and only import this module.
warnings.filterwarnings("ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore")


def run_job(script: Path) -> float | None:
    """Run this job of a sweep in a process of its own; return its best score, None if it has none.

    A job that is done is skipped and one that was interrupted is resumed, so that a sweep can be launched again and a
    scheduler can requeue a job. A job that fails leaves `error.json` in its folder and has no score; the sweep continues.

    Raises a KeyboardInterrupt if the job was ended by Ctrl-C, which ends the sweep; a SystemExit if the sweep was ended by
    SIGTERM, once the job has saved; a SegFitError if the job's folder holds another job, or cannot be written to.
    """
    global _stopped
    if _stopped:  # in a launcher's process that takes one job after another
        return None
    hydra = HydraConfig.get()
    run = RunFolder(Path(hydra.runtime.output_dir))
    folder = run.path
    overrides = list(hydra.overrides.task)
    before = read_yaml(run.overrides) if run.overrides.exists() else overrides
    if before != overrides:
        raise SegFitError(
            f"{folder}: holds another job ({before}) than {overrides}. Was the sweep changed? Launch it in another folder."
        )
    state, title = state_of(folder), f"── job {hydra.job.num}"
    if state == "running":
        print(f"{title}: still trained by {runs.holder(folder)}; skipped", flush=True)
        return None
    # Only a grid repeats what failed: a search has already continued without it.
    failed = state == "failed" or run.error.exists()
    if state == "done" or (failed and not is_grid(hydra)):
        print(f"{title}: {state} before", flush=True)
        return best_score(folder)
    if state == "failed":
        _set_aside(folder)
    print(f"\n{title}: {' '.join(overrides) or 'no overrides'}", flush=True)
    if state == "interrupted":
        run.error.unlink(missing_ok=True)
        overrides = [f"resume={quoted(folder)}"]
    else:
        runs.save_config(None, overrides, folder)
    alone = hydra.runtime.choices.get("hydra/launcher") == "basic"
    output = None if alone else run.output
    environment = {**_threads(hydra.launcher), **os.environ, _JOB_FOLDER: str(folder)}
    if environment.pop(QUIET, None):
        environment.pop("HYDRA_FULL_ERROR", None)
    code = _run(_command(hydra, script, overrides, folder), environment, output)
    if code == INTERRUPTED and alone:
        raise KeyboardInterrupt
    if code == INTERRUPTED:  # the other jobs save too, and the sweep waits for them
        _stopped = True
        return best_score(folder)
    if code != 0 and not run.error.exists() and runs.holder(folder) is None:
        how = "wrong input" if code == 2 else f"ended with exit code {code}"
        how += f", see {output or 'above'}"
        if code < 0:
            how = f"killed by signal {-code}" + " (out of host memory?)" * (code == -9)
        leave_error("crash", how, code, folder)
    return best_score(folder)


def state_of(folder: Path) -> str:
    """Return the state of a job by its folder.

    "unstarted"; "running", in another process; "done"; "interrupted", which can be resumed; "failed", which has to start
    over.
    """
    run = RunFolder(folder)
    if runs.holder(folder) is not None:
        return "running"
    error, metrics, started = dict[str, Any](), dict[str, Any](), run.config.exists()
    with contextlib.suppress(SegFitError):  # damaged
        error, metrics = read_json(run.error), read_json(run.metrics)
    if run.error.exists():
        code = error.get("exit_code")
        killed = isinstance(code, int) and code < 0  # by a signal, not by a fault of its own
        return "interrupted" if killed and started else "failed"
    if metrics.get("status") in COMPLETE:
        return "done"
    return "interrupted" if started else "unstarted"


def _set_aside(folder: Path) -> None:
    """Rename the folder of a failed job, to keep it."""
    names = (folder.with_name(f"{folder.name}-failed-{number}") for number in count(1))
    folder.rename(next(path for path in names if not path.exists()))
    folder.mkdir()


def is_grid(hydra: Any) -> bool:
    """Return whether a sweep is a grid and not a search."""
    return str(hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def config_flags(hydra: Any) -> list[str]:
    """Return the --config-dir flags that a sweep was launched with."""
    sources = [one for one in hydra.runtime.config_sources if one.provider == "command-line"]
    return [f"--config-dir={source.path}" for source in sources]


def _command(hydra: Any, script: Path, overrides: Sequence[str], folder: Path) -> list[str]:
    start = [sys.executable, str(script.resolve()), f"--config-name={hydra.job.config_name}"]
    kept = [text for text in hydra.overrides.hydra if not text.lstrip("+~").startswith(_SWEEP_ONLY)]
    own = [f"hydra.run.dir={quoted(folder)}", "hydra.mode=RUN"]
    return [*start, *config_flags(hydra), *overrides, *kept, *own]


def _threads(launcher: Any) -> dict[str, str]:
    """Return each job's share of the cores, if jobs run side by side on this machine."""
    at_a_time = launcher.get("n_jobs", 1)
    if at_a_time == 1:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, available_cores() // at_a_time))}  # -1: as many as cores


def _run(command: list[str], environment: dict[str, str], output: Path | None) -> int:
    """Run a command, its output on screen or appended to a file; return its exit code.

    At a scheduler's signal the job gets SIGTERM and saves; then the signal takes its effect.
    """
    global _stopped
    handled = _ENDING if threading.current_thread() is threading.main_thread() else set()
    received: list[int] = []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.open("ab")) if output is not None else None
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

        def end(number: int, _frame: FrameType | None) -> None:
            if not received:
                process.send_signal(signal.SIGTERM)
            received.append(number)

        before = {int(number): signal.signal(number, end) for number in handled}
        try:
            code = process.wait()
            if received:  # end as the launcher wants: submitit's handler requeues the job
                _stopped = True
                handler = before[received[0]]
                if callable(handler):
                    handler(received[0], None)
                sys.exit(TERMINATED)
            return code
        except KeyboardInterrupt:
            process.wait()  # the job gets the signal too, and saves
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def obey_ctrl_c() -> None:
    """If this process is a job of a sweep, let Ctrl-C end it, which it may inherit as ignored."""
    if _JOB_FOLDER in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_error(kind: str, message: str, exit_code: int, folder: Path | None = None) -> None:
    """Write why a job failed into its folder, for the leader board; None: that of this process, if it is a job of a sweep."""
    content = {"kind": kind, "message": message, "exit_code": exit_code}
    if folder is not None or _JOB_FOLDER in os.environ:
        with contextlib.suppress(OSError):
            run = RunFolder(folder or Path(os.environ[_JOB_FOLDER]))
            replace_text(run.error, json.dumps(content))


def best_score(folder: Path) -> float | None:
    """Return a finished job's best monitored score; None, a failed trial for Optuna, if it failed or there is none."""
    row = read_job(folder)
    return None if row.failed else row.score
