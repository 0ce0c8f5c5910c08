"""What a machine may lack: training goes on without it, and says so once, on the screen and in train.log."""

import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from segfit.commands import train as training
from segfit.engine.events import EndLog
from segfit.report.loggers import Loggers
from segfit.report.tensorboard import TensorBoardLogger
from segfit.system.monitor import Monitor
from tests.integration.training import (
    TINY,
    command,
    compose_run,
    finished,
    mounting,
    one_thread,
    the_run,
    train_by_command_line,
)
from tests.unit.data.files import write_pairs
from tests.unit.report import events
from tests.unit.system.test_cards import LARGE, FakeDriver, FakeNvml, plug_in

SMALL = ("epochs=1", "data.train_size=8", "image_size=32", "data.resolution=32")


class LostCard(FakeNvml):
    """A card that NVML counts, and then has lost."""

    def nvmlDeviceGetName(self, handle: int) -> str:  # noqa: N802
        raise RuntimeError("GPU is lost")

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> None:  # noqa: N802
        raise RuntimeError("GPU is lost")

    def nvmlShutdown(self) -> None:  # noqa: N802
        raise RuntimeError("Unknown Error")


@pytest.fixture
def screen(monkeypatch, capsys):
    """Train in `folder` as train.py does; return how it ended, the screen and the log, each on one line."""
    monkeypatch.setenv("COLUMNS", "1000")

    def run(folder: Path, *overrides: str, base: tuple[str, ...] = TINY) -> tuple[EndLog, str, str]:
        config = compose_run(*SMALL, *overrides, base=base)
        with one_thread():
            end = training.train(config, overrides, folder)
        printed = capsys.readouterr()
        log = (folder / "train.log").read_text(encoding="utf-8")
        return end, " ".join((printed.out + printed.err).split()), " ".join(log.split())

    return run


def reported_once(text: str, outcome: tuple[EndLog, str, str]) -> None:
    end, printed, log = outcome
    assert end.reason == "finished"
    assert printed.count(text) == 1, printed
    assert log.count(text) == 1, log


def test_no_tensorboard(screen, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "segfit.report.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    reported_once("report.logger=tensorboard cannot be used", screen(tmp_path / "run"))


def test_a_file_where_tensorboard_writes(screen, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    reported_once("cannot write TensorBoard events", screen(tmp_path / "run"))


def test_data_and_tensorboards_folder_that_are_read_only(tmp_path):
    """Of real file systems that nobody may write to; the names of the data are odd ones."""
    source = tmp_path / "source"
    write_pairs(source / "train", ["ü é 日本", "a=b,c", "it's {x} $HOME"], size=(40, 48))
    write_pairs(source / "val", ["-dash ~#"], size=(40, 48))
    for place in ("data ü, 'q'=1", "run/tensorboard"):
        (tmp_path / place).mkdir(parents=True)
    read_only = mounting(
        "mount -t tmpfs none data* && cp -r source/. data*/ && mount -o remount,ro data* && "
        "mount -t tmpfs -o ro none run/tensorboard",
        tmp_path,
    )
    tiny = (text for text in TINY if not text.startswith("data"))
    root = f"data.root=\"{tmp_path}/data ü, 'q'=1\""
    data = ("data=folder", "data.num_classes=3", "data.cache=disk", root)
    done = finished([*read_only, *command(*tiny, *data, "hydra.run.dir=run", "epochs=1")], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    message = "cannot write TensorBoard events"
    assert (done.stdout + done.stderr).count(message) == 1
    assert (tmp_path / "run/train.log").read_text().count(message) == 1
    assert json.loads((tmp_path / "run/metrics.json").read_text())["status"] == "finished"


def test_tensorboard_that_fails_while_training(screen, tmp_path, monkeypatch):
    def full(self, *arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorBoardLogger, "scalars", full)
    reported_once(
        "tensorboard: cannot write: No space left on device",
        screen(tmp_path / "run", "epochs=2"),
    )


@pytest.mark.parametrize(
    "library",
    [None, FakeNvml({LARGE: 8192}, broken=True), LostCard({LARGE: 8192})],
    ids=["none", "no driver", "lost"],
)
def test_no_nvml(screen, tmp_path, monkeypatch, library):
    plug_in(monkeypatch, None, library)
    end, printed, _ = screen(tmp_path / "run")
    assert end.reason == "finished"
    assert "NVML" not in printed  # nothing is missing where there is no card to watch


@pytest.mark.parametrize("library", [None, LostCard({LARGE: 8192})], ids=["none", "lost"])
def test_a_card_without_nvml_is_reported(tmp_path, monkeypatch, library):
    plug_in(monkeypatch, FakeDriver({LARGE: 8192}), library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    messages: list[str] = []
    report = Loggers({}, Monitor(), messages.append)
    report.start(events.info())
    report.close()
    (message,) = messages
    assert "NVML does not answer" in message


def test_no_hub(screen, tmp_path):
    base = tuple(text for text in TINY if not text.startswith("model"))
    reported_once(
        "WARNING: RANDOM WEIGHTS", screen(tmp_path / "run", "model=segformer_b0", base=base)
    )


def test_a_clock_that_jumps_by_years(screen, tmp_path, monkeypatch):
    now, jumps = time.time(), itertools.cycle([0, 4e8, -9e8, 1e9, -1e5, 3])
    monkeypatch.setattr(time, "time", lambda: now + next(jumps))
    end, printed, log = screen(tmp_path / "run", "epochs=2")
    assert (end.reason, end.updates) == ("finished", 4)
    assert "update 4/4" in printed
    assert "update 4/4" in log
    shown = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Scalars("loss/train")
    assert [event.step for event in shown] == [1, 2, 3, 4]


@pytest.mark.slow
def test_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    tiny = ("model=cnn", "model.base_channels=4", "batch_size=2", "loader.workers=0", "device=cpu")
    # A process of its own: one that is forked may have read CXX already.
    options = (*SMALL, *tiny, "data.val_size=2", "compile=true", "report.logger=[]")
    code, printed = train_by_command_line(tmp_path, *options, PYTHONUNBUFFERED="1")
    assert code == 0, printed
    text = "torch.compile failed, running eager"
    assert printed.count(text) == 1
    assert (the_run(tmp_path) / "train.log").read_text(encoding="utf-8").count(text) == 1
