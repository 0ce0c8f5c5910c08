"""One measurement in a process of its own: what crashes there, or leaves the device unusable, costs nothing here.

The parent writes the config and a request into a folder; the child, `python -m segfit.tuning.trial <folder>`, reads
the config as a run's is read (plain values into the schema), calls the job and leaves its result there.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import psutil
from omegaconf import DictConfig, OmegaConf

from segfit.config.check import plain
from segfit.config.tasks import schema_of
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.system.files import replace_text


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
    """Run a job on a config in a fresh process and wait for it, at most `timeout_s` seconds (None: for ever).

    The child never outlives this process: it ends with it, with Ctrl-C, and with the time limit. The job, "module:function",
    is called there as function(config, **arguments), plain values, and returns plain values. The config is a checked one of
    train.py or benchmark.py; a run that it may want to resume is left alone.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="segfit-", ignore_cleanup_errors=True) as temporary:
        folder, values = Path(temporary), plain(config)
        # Without what benchmark.py asks about it.
        kept = {item.name: values[item.name] for item in fields(schema_of(config.task.name).Run)}
        runs.save_config(OmegaConf.create(kept), [], folder)
        request = json.dumps({"job": job, "arguments": arguments})
        (folder / "request.json").write_text(request, encoding="utf-8")
        ended = _run_child(folder, timeout_s)
    return Outcome(seconds=time.monotonic() - start, **ended)


def _run_child(folder: Path, timeout_s: float | None) -> dict[str, Any]:
    output, result = folder / "output.txt", folder / "result.json"
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
    message = (
        f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    )
    if code == -9:  # SIGKILL, which Windows does not know
        message += " (most likely the system, short of host memory)"
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n")
    said = " / ".join([line.strip() for line in lines if line.strip()][-3:])
    return {"ok": False, "reason": "crash", "message": f"{message}: {said}" if said else message}


def _kill(pid: int) -> None:
    """End a child and the data workers that it started; nothing happens if it has ended."""
    with suppress(psutil.Error):
        child = psutil.Process(pid)
        for process in (*child.children(recursive=True), child):
            with suppress(psutil.Error):
                process.kill()


def main(folder: Path) -> None:
    """Run the job that the request in `folder` names, and write the result beside it."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    try:
        job = resolve_name(request["job"])
        result = {"ok": True, "values": job(runs.load_config(folder), **request["arguments"])}
    except SegFitError as error:
        result = {"ok": False, "reason": "input", "message": "\n".join(error.problems)}
    except Exception as error:
        from segfit.engine.out_of_memory import is_out_of_memory

        first = str(error).strip().partition("\n")[0]
        message = ": ".join(filter(None, (type(error).__name__, first)))
        reason = "oom" if is_out_of_memory(error) else "crash"
        result = {"ok": False, "reason": reason, "message": message}
    replace_text(folder / "result.json", json.dumps(result))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)  # at once, whatever the main thread is in


if __name__ == "__main__":
    main(Path(sys.argv[1]))
