"""Scripts in processes that need not import torch: each is forked from one that has, as the tests' waiting is imports."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import IO
from unittest.mock import patch

from segfit.sweeps import job

_CONTEXT = multiprocessing.get_context("forkserver")
# What train.py, evaluate.py and benchmark.py import once their work starts.
_PRELOAD = [
    *("torch._dynamo", "torch.distributed", "torchmetrics", "transformers", "kornia", "pytest"),
    *("segfit.cli.main", "segfit.commands.train", "segfit.commands.evaluate"),
    *("segfit.tasks.segmentation.assembly", "torchvision.transforms.v2"),
    *("segfit.tasks.restoration.assembly", "segfit.tasks.forecasting.assembly"),
    *("segfit.report.tensorboard", "segfit.tuning", "timm.optim", "tests.integration.warm"),
]
_CONTEXT.set_forkserver_preload(_PRELOAD)
_ROOT = str(Path(__file__).parents[2])  # whose `tests` the preloading process has to find


class Forked:
    """A running script with the methods of a `subprocess.Popen`; what it prints can be read from `stdout`.

    Args:
        arguments: the path of a script and its command line.
        folder: the script's working folder.
        environment: all of its environment variables; what Python reads as it starts has no effect, and a job of a sweep
            that has the override $KILLED dies at once.
        stderr: where its errors go; None: to `stdout` too.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        environment: Mapping[str, str],
        stderr: Path | None = None,
    ) -> None:
        reader, writer = _CONTEXT.Pipe(duplex=False)
        task = (arguments, str(folder), dict(environment), writer, stderr)
        self._process = _CONTEXT.Process(target=_run, args=task, daemon=True)  # ends with the tests
        with patch.dict(os.environ, PYTHONPATH=_ROOT):
            self._process.start()
        writer.close()
        self.arguments = arguments
        self.stdout = open(os.dup(reader.fileno()))  # noqa: PTH123, SIM115
        reader.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        output = self.stdout.read()
        self.wait(timeout)
        return output, None

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    arguments: list[str],
    folder: str,
    environment: dict[str, str],
    stdout: Connection,
    stderr: Path | None,
) -> None:
    """Become the script, in a process group of its own as a terminal's."""
    multiprocessing.current_process().daemon = False  # or it could start no workers
    multiprocessing.set_start_method(None, force=True)  # the default, as at home
    os.setsid()
    os.dup2(stdout.fileno(), 1)
    errors = stdout.fileno() if stderr is None else os.open(stderr, os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, 2)
    stdout.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    sweeps = any(text == "-m" or text.startswith("resume_sweep=") for text in arguments)
    if sweeps and not any("launcher" in text for text in arguments):
        arguments, environment = _with_forked_jobs() or (arguments, environment)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        atexit._run_exitfuncs()


class _Job:
    """What a sweep needs of a `subprocess.Popen`."""

    def __init__(
        self,
        nursery: Connection,
        command: list[str],
        env: Mapping[str, str],
        stdout: IO[bytes] | None,
        stderr: object,
    ) -> None:
        nursery.send((command[1:], env, stdout and stdout.name))
        self._nursery, self._pid = nursery, nursery.recv()

    def wait(self) -> int:
        code: int = self._nursery.recv()
        return code

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)


def _with_forked_jobs() -> tuple[list[str], dict[str, str]] | None:
    """Let the jobs of a sweep be forked by a process that does nothing else, from which a job has no more than a new one.

    Returns None to the sweep, and to each job its script with arguments and its environment.
    """
    here, there = multiprocessing.Pipe()
    if os.fork():
        there.close()
        job.subprocess = SimpleNamespace(Popen=partial(_Job, here))  # type: ignore[assignment]
        return None
    here.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError):  # the sweep is over
        while True:
            arguments, environment, output = there.recv()
            if pid := os.fork():
                there.send(pid)
                there.send(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                continue
            there.close()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if environment.get("KILLED") in arguments:
                os.kill(os.getpid(), signal.SIGKILL)
            if output is not None:
                file = os.open(output, os.O_WRONLY | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
            return arguments, environment
    os._exit(0)
