"""One measurement in a process of its own: what crashes there, or leaves the device unusable, costs nothing here.

The parent writes the config and a request into a folder; the child, `python -m segfit.tuning.trial <folder>`, reads
the config as a run's is read (plain values into the schema), calls the job and leaves its result there.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from segfit.config.check import plain
from segfit.config.tasks import schema_of
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.system.files import replace_text

_REQUEST, _RESULT, _OUTPUT = "request.json", "result.json", "output.txt"
_LINES = 3  # of the child's output that a message quotes


@dataclass(frozen=True)
class Outcome:
    """How a trial ended."""

    ok: bool  # the job returned
    values: dict[str, Any] = field(default_factory=dict)  # what it returned
    reason: str | None = None  # why not: "oom", "crash", "timeout" or "input" (a SegFitError)
    message: str = ""  # the error, for the user
    seconds: float = 0.0  # wall-clock time of the whole process


def run_trial(
    config: DictConfig, *, job: str, timeout_s: float | None, **arguments: Any
) -> Outcome:
    """Run a job on a config in a fresh process and wait for it.

    The child never outlives this process: it ends with it, with Ctrl-C, and with the time limit.

    Args:
        config: checked; of train.py or benchmark.py. A run that it may want to resume is left alone.
        job: module:function, called in the child as function(config, **arguments); returns plain values.
        timeout_s: seconds until the child is killed; None: never.
        arguments: of the job, plain values.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix="segfit-trial-", ignore_cleanup_errors=True
    ) as temporary:
        folder = Path(temporary)
        values = plain(config)  # without what benchmark.py asks about it
        kept = {item.name: values[item.name] for item in fields(schema_of(config.task.name).Run)}
        runs.save_config(OmegaConf.create(kept), [], folder)
        request = {"job": job, "arguments": arguments}
        (folder / _REQUEST).write_text(json.dumps(request), encoding="utf-8")
        ended = _run_child(folder, timeout_s)
    return Outcome(seconds=time.monotonic() - start, **ended)


def _run_child(folder: Path, timeout_s: float | None) -> dict[str, Any]:
    """Return how the child ended, as fields of an outcome."""
    output, result = folder / _OUTPUT, folder / _RESULT
    with (
        output.open("wb") as file,
        subprocess.Popen(
            [sys.executable, "-m", "segfit.tuning.trial", str(folder)],
            stdin=subprocess.PIPE,  # never written to: the child reads its end when this process ends
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is this process's to handle, and it kills the child
        ) as process,
    ):
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return {"ok": False, "reason": "timeout", "message": f"not done after {timeout_s:g} s"}
        finally:
            _kill(process.pid)
    if result.exists():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    message = f"ended with exit code {code}"
    if code < 0:
        message = f"killed by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            message += " (most likely the system, short of host memory)"
    text = output.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines:
        message += f": {' / '.join(lines[-_LINES:])}"
    return {"ok": False, "reason": "crash", "message": message}


def _kill(pid: int) -> None:
    """End a child and the data workers that it started; nothing happens if it has ended."""
    with contextlib.suppress(psutil.Error):
        child = psutil.Process(pid)
        for process in (*child.children(recursive=True), child):
            with contextlib.suppress(psutil.Error):
                process.kill()


def main(folder: Path) -> None:
    """Run the job that the request in `folder` names, and write the result beside it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads((folder / _REQUEST).read_text(encoding="utf-8"))
    module, _, name = request["job"].partition(":")
    result: dict[str, Any] = {"ok": False}
    try:
        job = getattr(import_module(module), name)
        values = job(runs.load_config(folder), **request["arguments"])
        result = {"ok": True, "values": values}
    except SegFitError as error:
        result |= {"reason": "input", "message": "\n".join(error.problems)}
    except Exception as error:
        from segfit.engine.out_of_memory import is_out_of_memory

        first = str(error).strip().partition("\n")[0]
        result["message"] = ": ".join(filter(None, (type(error).__name__, first)))
        result["reason"] = "oom" if is_out_of_memory(error) else "crash"
    replace_text(folder / _RESULT, json.dumps(result))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # at once, whatever the main thread is in


if __name__ == "__main__":
    main(Path(sys.argv[1]))
