"""benchmark=diagnose on real trainings, each slowed down by one thing on purpose: the verdict names it."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from segfit.config.check import check
from segfit.engine.findings import Findings
from segfit.errors import SegFitError
from segfit.tuning import Bench, diagnose, timeline
from tests.integration.training import command, finished, one_thread
from tests.unit.composing import composed

# Nothing holds this one up but its own arithmetic.
FED = (
    "model=cnn",
    "model.base_channels=8",
    "image_size=64",
    "batch_size=4",
    "loader.workers=0",
    "data=shapes",
    "data.train_size=64",
    "data.val_size=2",
    "data.test_size=1",
    "data.resolution=64",
    "data.cache=ram",
    "augmentation=none",
    "device=cpu",
    "hardware=cpu",
    "report.log_every=50",
    "val_every=1000",
    "checkpoint.every_minutes=null",
)


def composed_with(*overrides: str) -> DictConfig:
    base = [text for text in FED if "model=segformer_b0" not in overrides or "model" not in text]
    last = {text.split("=")[0]: text for text in (*base, *overrides)}
    config = composed("benchmark=diagnose", *last.values(), name="benchmark")
    check(config)
    return config


def diagnosed(folder: Path, *overrides: str, seconds: float = 1.5) -> Findings:
    config = composed_with(f"seconds={seconds}", *overrides)
    with one_thread():
        return diagnose.run(config, Bench(folder, lambda _: None, lambda *_: None))


def gain_of(found: Findings, bottleneck: str, key: str) -> float:
    """Return the predicted gain of the one change of an option that removes a bottleneck."""
    changes = next(table for table in found.tables if table.name == "changes")
    (row,) = (row for row in changes.rows if row[0] == bottleneck)
    assert str(row[1]).startswith(f"{key}=")
    return float(row[2])


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """Let samples that are slow on purpose be timed for half a second."""
    monkeypatch.setattr(timeline, "_SECONDS", 0.5)


@pytest.fixture
def four_cores(monkeypatch):
    """Let the verdict believe in spare cores, whatever machine runs the tests."""
    monkeypatch.setattr(timeline, "available_cores", lambda: 4)


@pytest.fixture
def one_core(monkeypatch):
    """Let the verdict know of no core that a worker could have."""
    monkeypatch.setattr(timeline, "available_cores", lambda: 1)


@pytest.fixture
def alone(monkeypatch):
    """Let the time that others have the processor not pass for waiting for the disk."""
    timed = timeline._timed

    def by_the_processors_clock(work, *arguments):
        _, cpu, result = timed(work, *arguments)
        return cpu, cpu, result

    monkeypatch.setattr(timeline, "_timed", by_the_processors_clock)


def test_a_slow_disk_is_named_and_the_cache_helps_as_predicted(tmp_path):
    slow = ("benchmark.slow_disk_ms=80", "data.cache=none", "benchmark.apply=true")
    found = diagnosed(tmp_path, *slow, "benchmark.warmup=2", seconds=0.8)
    values = found.values
    assert values["bottleneck"] == "slow disk"
    assert values["change"] == {"data.cache": "ram"}
    assert values["facts"]["costs"]["wait"] >= 0.04
    assert values["predicted_gain"] > 2
    assert values["measured_gain"] > 1.5
    assert "of the time waits for data. Bottleneck: slow disk. Use data.cache=ram" in found.headline
    assert found.headline.endswith("python train.py data.cache=ram")
    waiting = [row for row in found.tables[0].rows if row[0] == "waiting for data"]
    assert waiting[0][1] >= 160  # four images an update, at least 40 ms each
    assert sum(row[2] for row in found.tables[0].rows) == pytest.approx(100, abs=1)
    assert {table.name for table in found.tables} == {"phases", "sample", "changes"}
    assert len(found.figures["phases"]().axes[0].get_yticklabels()) == 2
    assert (tmp_path / "run" / "tensorboard").is_dir()
    assert (tmp_path / "changed" / "checkpoints" / "last.pt").exists()


def test_workers_restarted_every_epoch_are_named(tmp_path, four_cores):
    found = diagnosed(
        tmp_path, "loader.workers=1", "loader.persistent=false", "data.train_size=8", "report.logger=[]",
    )  # fmt: skip
    assert found.values["bottleneck"] == "workers restarted every epoch"
    assert found.values["change"] == {"loader.persistent": "true"}
    assert found.values["timeline"]["epochs"] > 1
    assert gain_of(found, "workers restarted every epoch", "loader.persistent") > 1


def test_what_does_not_fit_is_reported_and_left_out(tmp_path, monkeypatch):
    real = diagnose.measure_training

    def with_little_memory(config, **how):
        if config.batch_size > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(config, **how)

    monkeypatch.setattr(diagnose, "measure_training", with_little_memory)
    notices, most = [], [4]
    config = composed_with("seconds=0.2", "benchmark.warmup=0", "report.logger=[]")
    with one_thread():
        found = diagnose.run(config, Bench(tmp_path, notices.append, lambda *_: None))
    assert "batch_size=8: does not fit into memory." in notices
    assert not any(
        "batch_size" in one["change"]["options"] for one in found.values["facts"]["tried"]
    )
    most[0] = 3
    with one_thread(), pytest.raises(SegFitError, match="out of memory with batch_size=4"):
        diagnose.run(config, Bench(tmp_path, notices.append, lambda *_: None))


@pytest.mark.parametrize(
    ("options", "tried"),
    [
        ((), {"compile": True}),
        (("compile=true",), {"compile_mode": "reduce-overhead"}),
        (("compile=true", "accumulate=2"), None),
        (("compile=true", "compile_mode=reduce-overhead"), None),
    ],
)
def test_on_a_card_the_next_way_to_launch_fewer_kernels_is_tried(monkeypatch, options, tried):
    monkeypatch.setattr(diagnose, "resolve_device", lambda _: (torch.device("cuda", 0), None))
    monkeypatch.setattr(diagnose, "native_precisions", lambda _: ("bf16",))
    config = composed("benchmark=diagnose", "device=cuda", *options, name="benchmark")
    found = [one.options for one in diagnose.settings(config) if one.name == "many small kernels"]
    assert found == ([tried] if tried else [])


@pytest.mark.slow
def test_too_few_workers_are_named(tmp_path, four_cores, alone):
    found = diagnosed(tmp_path, "data.resolution=192", "data.cache=none", "image_size=32")
    assert found.values["bottleneck"] == "too few workers"
    assert 1 <= int(found.values["change"]["loader.workers"]) <= 3


@pytest.mark.slow
def test_image_decoding_is_named(tmp_path, one_core, alone):
    found = diagnosed(tmp_path, "data.resolution=192", "data.cache=none", "image_size=32")
    assert found.values["bottleneck"] == "image decoding"
    assert found.values["change"] == {"data.cache": "ram"}


@pytest.mark.slow
def test_cpu_augmentation_is_named(tmp_path, one_core, alone):
    everything = [f"augmentation.{name}=1" for name in ("affine", "color_jitter", "blur", "noise")]
    found = diagnosed(tmp_path, "augmentation=cpu", *everything, "batch_size=16", "image_size=128")
    assert found.values["bottleneck"] == "CPU augmentation"
    assert found.values["change"] == {"augmentation": "kornia-gpu"}


@pytest.mark.slow
def test_too_small_a_batch_is_named(tmp_path):
    found = diagnosed(tmp_path, "batch_size=1", "image_size=32", "accumulate=8")
    assert found.values["bottleneck"] == "too small a batch"
    change = {key: int(value) for key, value in found.values["change"].items()}
    assert change["batch_size"] * change["accumulate"] == 8


@pytest.mark.slow
def test_the_stock_model_is_named_where_the_arithmetic_is_all_there_is(tmp_path):
    found = diagnosed(
        tmp_path, "model=segformer_b0", "model.weights=null", "model.fast=false", "image_size=128", "batch_size=8", "data.train_size=12",
    )  # fmt: skip
    assert found.values["bottleneck"] == "the stock model"
    assert found.values["change"] == {"model.fast": "true"}
    assert "is the model's own arithmetic" in found.headline


@pytest.mark.slow
def test_the_command_line_writes_everything_down(tmp_path):
    typed = [text for text in FED if not text.startswith(("model.base", "data.cache="))]
    arguments = ("benchmark=diagnose", "seconds=1", "benchmark.slow_disk_ms=40", *typed)
    done = finished(command(*arguments, script="benchmark.py"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (results,) = tmp_path.glob("outputs/benchmark/**/results.json")
    values = json.loads(results.read_text())["values"]
    assert values["bottleneck"] == "slow disk"
    for name in ("phases.png", "phases.csv", "sample.csv", "changes.csv"):
        assert (results.parent / name).stat().st_size > 0
    assert values["command"].startswith("python train.py model=cnn ")
    assert values["command"].endswith(" data.cache=ram")
    assert "benchmark" not in values["command"]
    assert values["command"].replace(" data.cache=ram", "").split()[2:] == typed
    assert "python train.py" in done.stdout
