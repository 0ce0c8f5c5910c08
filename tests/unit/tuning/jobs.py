"""Jobs for trials in child processes: how a measurement may end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from segfit.errors import SegFitError


def tell(config: DictConfig, **arguments: Any) -> dict[str, Any]:
    return {"batch_size": config.batch_size, "pid": os.getpid(), **arguments}


def refuse(config: DictConfig) -> dict[str, Any]:
    raise SegFitError(["data.root: no such folder.", "lr: too large."])


def allocate(config: DictConfig) -> dict[str, Any]:
    import torch

    return {"bytes": torch.empty(2**60).numel()}


def crash(config: DictConfig) -> dict[str, Any]:
    raise ValueError("a bug\nin two lines")


def die(config: DictConfig, *, number: int) -> dict[str, Any]:
    print("last words", flush=True)
    os.kill(os.getpid(), number)
    time.sleep(60)
    return {}


def segfault(config: DictConfig) -> dict[str, Any]:
    import ctypes

    ctypes.string_at(0)
    return {}


def leave(config: DictConfig) -> dict[str, Any]:
    os._exit(3)


def hang(config: DictConfig, *, tell_pids: str) -> dict[str, Any]:
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    Path(tell_pids).write_text(f"{os.getpid()} {worker.pid}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(300)
    return {}


def fits_the_second_time(config: DictConfig, **arguments: Any) -> dict[str, Any]:
    killed = Path(os.environ["SEGFIT_TEST_KILLED"])
    if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    from segfit.tuning.measure import fits

    return fits(config, **arguments)
