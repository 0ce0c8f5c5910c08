"""A job of a sweep: a process of its own, so that what kills one cannot touch the next."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import yaml
from hydra.core.hydra_config import HydraConfig

from segfit.errors import SegFitError
from segfit.runs import lock as locks
from segfit.runs.folder import CONFIG, METRICS, OVERRIDES
from segfit.runs.untrusted import read_json, read_yaml
from segfit.system.cores import available_cores
from segfit.system.files import replace_text

ERROR = "error.json"
OUTPUT = "output.log"
FINAL = ("finished", "max_steps", "patience")  # what metrics.json says of a job that is done
INTERRUPTED = 130
TERMINATED = 143
QUIET = "SEGFIT_QUIET_ERRORS"  # set where HYDRA_FULL_ERROR=1 is ours and not the person's
_JOB_FOLDER = "SEGFIT_JOB_FOLDER"  # set for the processes of a sweep
# Of the sweep itself; a job must not sweep again, and has its own folder.
_SWEEP_ONLY = ("hydra.mode", "hydra.run", "hydra.sweep", "hydra.sweeper", "hydra.launcher", "hydra/sweeper",
               "hydra/launcher")  # fmt: skip
# SIGUSR1 and SIGUSR2 are how Slurm and submitit say that time is up, or that others need the card.
ENDING = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
_stopped = False
# The plugins' schemas check what conf/hydra/launcher sets, as they should. Here, since processes of launchers
# compose too, and do no more of SegFit's than import it.
warnings.filterwarnings(
    "ignore", r"\s*'hydra/launcher/\w+' is validated against ConfigStore schema"
)


def run_job(monitor: str, script: Path) -> float | None:
    """Run this job of a sweep in a process of its own; return its best score, None if it has none.

    A job that is done is left alone, one that was interrupted goes on: so a sweep can be launched again, and so
    a scheduler can queue a job again. A job that fails leaves `error.json` in its folder and has no score;
    the sweep goes on.

    Args:
        monitor: name of the score.
        script: train.py.

    Raises:
        KeyboardInterrupt: if the job was ended by Ctrl-C, which ends the sweep.
        SystemExit: if the sweep was ended by SIGTERM, once the job has saved.
        SegFitError: if the job's folder holds another job, or cannot be written to.
    """
    global _stopped
    if _stopped:  # a launcher's process that would take the next one
        return None
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    overrides = list(hydra.overrides.task)
    _refuse_another(folder, overrides)
    state, title = state_of(folder), f"── job {hydra.job.num}"
    if state == "running":
        _tell(f"{title}: still trained by {locks.holder(folder)}; left alone")
        return None
    # A search gave up a point that failed and went on from there; only a grid tries it again.
    given_up = state == "failed" or (folder / ERROR).exists()
    if state == "done" or (given_up and not is_grid(hydra)):
        _tell(f"{title}: {state} before")
        return best_score(folder, monitor)
    if state == "failed":
        _set_aside(folder)
    _tell(f"\n{title}: {' '.join(overrides) or 'as it is'}")
    if state == "interrupted":
        (folder / ERROR).unlink(missing_ok=True)
        overrides = [f"resume={quoted(folder)}"]
    else:
        _write_overrides(folder, overrides)
    alone = hydra.runtime.choices.get("hydra/launcher") == "basic"
    output = None if alone else folder / OUTPUT
    environment = {**_threads(hydra.launcher), **_environment(folder)}
    code = _run(_command(hydra, script, overrides, folder), environment, output)
    if code == INTERRUPTED and alone:
        raise KeyboardInterrupt
    if code == INTERRUPTED:  # the other jobs save too, and are waited for
        _stopped = True
        return best_score(folder, monitor)
    if code != 0 and not (folder / ERROR).exists() and locks.holder(folder) is None:
        write_error(folder, "crash", _how_it_ended(code, output), code)
    return best_score(folder, monitor)


def state_of(folder: Path) -> str:
    """Say what a job's folder holds.

    Returns:
        str: "unstarted"; "running", by a process that has the folder; "done"; "interrupted", which can go on;
            or "failed", which has to start over.
    """
    if locks.holder(folder) is not None:
        return "running"
    started = (folder / CONFIG).exists()
    error = _read(folder / ERROR)
    if error is not None:
        code = error.get("exit_code")
        killed = isinstance(code, int) and code < 0  # by a signal: nothing is wrong with the job
        return "interrupted" if killed and started else "failed"
    metrics = _read(folder / METRICS)
    if metrics is not None and metrics.get("status") in FINAL:
        return "done"
    return "interrupted" if started else "unstarted"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return read_json(path)
    except FileNotFoundError:
        return None
    except SegFitError:  # torn
        return {}


def _refuse_another(folder: Path, overrides: Sequence[str]) -> None:
    try:
        before = read_yaml(folder / OVERRIDES)
    except FileNotFoundError:
        return
    if before != list(overrides):
        raise SegFitError(
            f"{folder}: holds another job ({before}) than {list(overrides)}. Was the sweep changed? Launch it "
            f"anew, in a folder of its own."
        )


def _write_overrides(folder: Path, overrides: Sequence[str]) -> None:
    try:
        replace_text(folder / OVERRIDES, yaml.safe_dump(list(overrides), allow_unicode=True))
    except OSError as error:
        raise SegFitError(
            f"cannot write to the job's folder {folder}: {error.strerror}."
        ) from error


def _set_aside(folder: Path) -> None:
    """Move what a failed job left out of the way, and keep it."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}-failed-{number}")).exists():
        number += 1
    folder.rename(aside)
    folder.mkdir()


def is_grid(hydra: Any) -> bool:
    """Say whether a sweep goes through a grid, and does not search."""
    return str(hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper")


def _tell(text: str) -> None:
    print(text, flush=True)


def quoted(path: Path) -> str:
    """Return a path such that Hydra's override grammar gives back the same text."""
    text = path.as_posix().replace("'", r"\'")
    return f"'{text}'"


def _command(hydra: Any, script: Path, overrides: Sequence[str], folder: Path) -> list[str]:
    kept = [text for text in hydra.overrides.hydra if not text.lstrip("+~").startswith(_SWEEP_ONLY)]
    own = [f"hydra.run.dir={quoted(folder)}", "hydra.mode=RUN"]
    extra = [
        f"--config-dir={source.path}"
        for source in hydra.runtime.config_sources
        if source.provider == "command-line"
    ]
    return [
        sys.executable,
        str(script.resolve()),
        f"--config-name={hydra.job.config_name}",
        *extra,
        *overrides,
        *kept,
        *own,
    ]


def _environment(folder: Path) -> dict[str, str]:
    """Return what the launcher gives its jobs (cards, threads), without what is the parent's alone."""
    environment = {**os.environ, _JOB_FOLDER: str(folder)}
    if environment.pop(QUIET, None):
        environment.pop("HYDRA_FULL_ERROR", None)
    return environment


def _threads(launcher: Any) -> dict[str, str]:
    """Return each job's share of the cores, where jobs run side by side on this machine."""
    at_a_time = launcher.get("n_jobs", 1)
    if at_a_time == 1:
        return {}
    cores = available_cores()
    share = cores // at_a_time if at_a_time > 0 else 1
    return {"OMP_NUM_THREADS": str(max(1, share))}


class _Signalled(BaseException):
    """A scheduler wants this job to end; `args[0]` is the signal."""


def _run(command: list[str], environment: dict[str, str], output: Path | None) -> int:
    """Run a command, its output on screen or at the end of a file; return its exit code.

    Whatever the scheduler's signal is, the job gets SIGTERM, and has saved before the signal takes its effect.
    """
    handled = ENDING if threading.current_thread() is threading.main_thread() else ()
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(output.open("ab")) if output is not None else None
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)

        def end(number: int, _frame: FrameType | None) -> None:
            for name in handled:
                signal.signal(name, signal.SIG_IGN)  # once is enough
            raise _Signalled(number)

        before = {number: signal.signal(number, end) for number in handled}
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.wait()  # the job got the signal too, and saves
            raise
        except _Signalled as signalled:
            process.send_signal(signal.SIGTERM)
            process.wait()
            _end_as(signalled.args[0], before)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _end_as(number: int, before: dict[signal.Signals, Any]) -> NoReturn:
    """End as whoever launched this job wants: submitit's own handler queues it again."""
    global _stopped
    _stopped = True
    handler = before[signal.Signals(number)]
    if callable(handler):
        handler(number, None)
    sys.exit(TERMINATED)


def _how_it_ended(code: int, output: Path | None) -> str:
    if code < 0:
        return f"killed by signal {-code}" + (" (out of host memory?)" if code == -9 else "")
    where = "above" if output is None else str(output)
    return f"wrong input, see {where}" if code == 2 else f"ended with exit code {code}, see {where}"


def obey_ctrl_c() -> None:
    """If this process is a job of a sweep, let Ctrl-C end it, though launchers' processes ignore it."""
    if _JOB_FOLDER in os.environ:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave_error(kind: str, message: str, exit_code: int) -> None:
    """If this process is a job of a sweep, leave why it failed in its folder, for the leader board."""
    folder = os.environ.get(_JOB_FOLDER)
    if folder is not None:
        write_error(Path(folder), kind, message, exit_code)


def write_error(folder: Path, kind: str, message: str, exit_code: int) -> None:
    """Leave the reason of a failure in a job's folder."""
    content = {"kind": kind, "message": message, "exit_code": exit_code}
    with contextlib.suppress(OSError):
        replace_text(folder / ERROR, json.dumps(content))


def best_score(folder: Path, monitor: str) -> float | None:
    """Return a finished job's best monitored score, None if it failed or there is none.

    None, since Hydra's Optuna sweeper ends at NaN, while it counts None as a trial that failed.
    """
    try:
        score = float(read_json(folder / METRICS)["best"][monitor])
    except (OSError, SegFitError, KeyError, TypeError, ValueError):
        return None
    return None if math.isnan(score) or (folder / ERROR).exists() else score
