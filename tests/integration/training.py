"""Trainings for tests: in this process where that is enough, else by the command line."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from segfit.assembly.training import Training, make_training
from segfit.config.check import check
from segfit.engine.checkpoint import load_checkpoint
from segfit.engine.events import EndLog
from segfit.runs import folder as runs
from tests.integration.forked import Forked
from tests.unit.composing import composed
from tests.unit.engine.fakes import Recorder

ROOT = Path(__file__).parents[2]

PATIENCE = 300  # seconds, on a machine that has much else to do

# The smallest training that is still one: a second or two.
TINY = (
    "model=cnn",
    "model.base_channels=8",
    "image_size=64",
    "batch_size=4",
    "epochs=2",
    "loader.workers=0",
    "data=shapes",
    "data.train_size=24",
    "data.val_size=6",
    "data.test_size=1",
    "data.resolution=64",
    "device=cpu",
    "report.log_every=1",
    "report.page=false",
)


@dataclass
class Trained:
    """A training that ran in this process."""

    training: Training
    end: EndLog
    heard: Recorder
    run: Path
    notices: list[str] = field(default_factory=list)

    @property
    def model(self) -> torch.nn.Module:
        return self.training.fit.state.model

    @property
    def losses(self) -> list[float]:
        return [log.loss for log in self.heard.logs]


def compose_run(*overrides: str, base: tuple[str, ...] = TINY) -> DictConfig:
    """Compose and check what `train.py` would of these overrides; the last one of a key wins."""
    last = {text.split("=")[0]: text for text in (*base, *overrides)}
    config = composed(*last.values())
    check(config)
    return config


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Restore what a training sets for its process; one thread adds up in one order."""
    threads = torch.get_num_threads()
    state = torch.get_rng_state()
    matmul = torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        torch.set_float32_matmul_precision(matmul)
        torch.use_deterministic_algorithms(False)


def train(run: Path, *overrides: str, base: tuple[str, ...] = TINY) -> Trained:
    """Train in this process, without console and files but for checkpoints and config."""
    config = compose_run(*overrides, base=base)
    return _fit(config, run, overrides)


def resume(run: Path, *overrides: str) -> Trained:
    """Go on with a run in this process."""
    return _fit(runs.resumed_config(run, [f"resume={run}", *overrides]), run, resumed=True)


def _fit(
    config: DictConfig, run: Path, overrides: Sequence[str] = (), *, resumed: bool = False
) -> Trained:
    notices: list[str] = []
    heard = Recorder()
    with one_thread():
        training = make_training(config, run, notices.append, resumed=resumed)
        runs.save_config(config, overrides, run, resumed=resumed)
        end = training.fit.run(heard, training.facts)
    return Trained(training, end, heard, run, notices + heard.notices)


def command(*arguments: str, script: str = "train.py") -> list[str]:
    return [sys.executable, str(ROOT / script), *arguments]


def environment() -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **offline, "COLUMNS": "200"}


def finished(
    arguments: Sequence[str], folder: Path, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run any command in a folder to its end; forked where it is Python with a file."""
    everything = {**environment(), **variables}
    if list(arguments[:1]) == [sys.executable] and arguments[1].endswith(".py"):
        with tempfile.NamedTemporaryFile("r") as errors:
            process = Forked(list(arguments[1:]), folder, everything, Path(errors.name))
            output, _ = process.communicate(timeout=PATIENCE)
            code = process.wait()
            return subprocess.CompletedProcess(arguments, code, output, errors.read())
    return subprocess.run(
        arguments,
        cwd=folder,
        env=everything,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def mounting(script: str, folder: Path | None = None) -> list[str]:
    """Return what to put before a command, which alone sees what a shell script in a folder mounts; skip where it may not."""
    prefix = ["unshare", "-rm", "sh", "-c", f'{script} && exec "$@"', "sh"]
    if shutil.which("unshare") is None or finished([*prefix, "true"], folder or ROOT).returncode:
        pytest.skip("may not mount")
    return prefix


def start(
    folder: Path, *arguments: str, script: str = "train.py", **variables: str
) -> "subprocess.Popen[str] | Forked":
    """Start `python train.py …` in a folder, in a process group of its own as a terminal would.

    It is forked, unless `variables` hold what Python reads as it starts.
    """
    line, everything = command(*arguments, script=script), {**environment(), **variables}
    if not any(name.startswith("PYTHON") for name in variables):
        return Forked(line[1:], folder, everything)
    return subprocess.Popen(
        line,
        cwd=folder,
        env=everything,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def train_by_command_line(folder: Path, *arguments: str, **variables: str) -> "tuple[int, str]":
    """Run `python train.py …` in a folder; return exit code and all that it printed."""
    process = start(folder, *arguments, **variables)
    output, _ = process.communicate(timeout=PATIENCE)
    return process.wait(), output


def start_struck(folder: Path, *arguments: str) -> "subprocess.Popen[str] | Forked":
    """Start `struck.py …` in a folder: train.py, and what is to befall it."""
    return start(folder, *arguments, script="tests/integration/struck.py")


def wait_for(
    process: "subprocess.Popen[str] | Forked",
    folder: Path,
    words: str,
    logs: str = "outputs/*/*/train.log",
) -> Path:
    """Wait until a run below a folder has printed some words; return the run."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        for log in folder.glob(logs):
            if words in log.read_text():
                return log.parent
        time.sleep(0.01)
    raise AssertionError(f"never printed {words!r}: {process.communicate()[0]}")


def the_run(folder: Path) -> Path:
    """Return the only run below a folder."""
    (config,) = folder.glob("outputs/*/*/config.yaml")
    return config.parent


def weights_of(checkpoint: Path, key: str = "model") -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_checkpoint(checkpoint)[key]
    return weights


def updates_of(run: Path) -> int:
    """Return the number of updates after which a run would go on."""
    updates: int = load_checkpoint(run / "checkpoints/last.pt")["progress"]["update"]
    return updates


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
