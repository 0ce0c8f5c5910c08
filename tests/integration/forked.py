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
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

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
        environment: all of its environment variables; what Python reads as it starts has no effect.
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
    os.environ.clear()
    os.environ.update(environment)
    sys.argv, sys.path[0] = arguments, str(Path(arguments[0]).parent)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        atexit._run_exitfuncs()
