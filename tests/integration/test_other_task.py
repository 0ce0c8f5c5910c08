"""A task that nothing in src names goes through the real command line: tests/other_task, noisy signals."""

import csv
import json
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from segfit.engine.checkpoint import load_checkpoint
from tests.integration.training import ROOT, command, finished, same, start, wait_for

HOME = ROOT / "tests" / "other_task"
TASKS = {"SEGFIT_TASKS": str(HOME)}
SIGNALS = (
    f"--config-dir={HOME / 'conf'}",
    *("task=signal", "hardware=cpu", "loader.workers=0", "device=cpu", "precision=fp32"),
)


def run(folder: Path, *arguments: str, script: str = "train.py", code: int = 0) -> str:
    done = finished(command(*arguments, script=script), folder, **TASKS)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("signals")
    output = run(folder, *SIGNALS, "hydra.run.dir=run")
    assert "signal/s" in output
    return folder


def test_no_line_of_the_program_names_it():
    assert not [path for path in (ROOT / "src").rglob("*.py") if "tasks.signal" in path.read_text()]
    assert sum(len(path.read_text().splitlines()) for path in HOME.rglob("*.py")) <= 200


def test_it_trains_towards_less(trained):
    lines = [json.loads(line) for line in (trained / "run/scores.jsonl").read_text().splitlines()]
    errors = [line["scores"]["mse"] for line in lines]
    metrics = json.loads((trained / "run/metrics.json").read_text())
    assert metrics["monitor_mode"] == "min"
    assert metrics["best"]["mse"] == min(errors) < 0.09  # the variance of the noise
    assert [line["best"] for line in lines] == [
        error == min(errors[: place + 1]) for place, error in enumerate(errors)
    ]
    assert metrics["columns"] == {"mse": "MSE"}


def test_it_is_evaluated_as_training_scored_it(trained):
    output = run(trained, "run=run", "device=cpu", script="evaluate.py")
    evaluated = json.loads((trained / "run/evaluation/val/metrics.json").read_text())
    assert evaluated["scores"] == json.loads((trained / "run/metrics.json").read_text())["best"]
    assert f"MSE {evaluated['scores']['mse']:.4f}" in output


def test_killed_and_resumed_it_ends_as_if_nothing_had_been(trained, tmp_path):
    run_dir = tmp_path / "run"
    slow = (
        "epochs=3",
        "checkpoint.every_steps=5",
        f"hydra.run.dir={run_dir}",
        "report.log_every=1",
    )
    process = start(tmp_path, *SIGNALS, *slow, **TASKS)
    wait_for(process, tmp_path, "update 20/", logs="run/train.log")
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(tmp_path, f"resume={run_dir}")
    resumed, calm = (
        load_checkpoint(path / "checkpoints/last.pt") for path in (run_dir, trained / "run")
    )
    assert same(resumed["model"], calm["model"])


def test_a_sweep_puts_the_least_error_first(tmp_path):
    output = run(tmp_path, "-m", *SIGNALS, "lr=0.00001,0.01", "hydra.sweep.dir=sweep", "epochs=1")
    with (tmp_path / "sweep/leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    errors = [float(row["best_mse"]) for row in rows]
    assert [row["lr"] for row in rows] == ["0.01", "1e-05"]
    assert errors == sorted(errors)
    assert "MSE" in output


@pytest.mark.parametrize(
    ("mode", "options", "answer"),
    [
        pytest.param("plan", (), "it fits", marks=pytest.mark.slow),
        pytest.param("throughput", ("benchmark.warmup=1",), "TFLOP", marks=pytest.mark.slow),
        pytest.param("max_batch", ("batch_size=64",), "batch_size=", marks=pytest.mark.slow),
        ("lr_find", ("benchmark.updates=40",), "lr"),
        pytest.param("diagnose", ("benchmark.warmup=1",), "Bottleneck", marks=pytest.mark.slow),
    ],
)
def test_benchmarks_answer(tmp_path, mode, options, answer):
    arguments = (*SIGNALS, f"benchmark={mode}", "seconds=0.3", "hydra.run.dir=found", *options)
    output = run(tmp_path, *arguments, script="benchmark.py")
    assert answer in output
    assert json.loads((tmp_path / "found/results.json").read_text())["benchmark"] == mode


def test_the_fastest_setting_is_written_and_composes(tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(HOME / "conf", conf)
    options = (
        *("benchmark=optimize", f"benchmark.out={conf / 'hardware/signal/local.yaml'}"),
        *("benchmark.grow=true", "model.channels=16", "seconds=0.01", "benchmark.warmup=0"),
    )
    output = run(tmp_path, *SIGNALS, *options, script="tests/integration/in_process.py")
    assert (
        "Nothing grew" in output
    )  # it has neither base_channels nor num_blocks, nor larger samples
    arguments = (f"--config-dir={conf}", *SIGNALS[1:], "hardware=local", "hydra.run.dir=run")
    run(tmp_path, *arguments, "epochs=1")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (config["hardware"]["name"], config["model"]["channels"]) == ("local", 16)
    assert config["batch_size"] * config["accumulate"] in (4, 8)


def test_what_is_wrong_with_it_is_said_by_its_own_rules(tmp_path):
    output = run(tmp_path, *SIGNALS, "length=33", "lr=-1", code=2)
    assert "lr=-1.0: must be more than 0" in output
    assert "length=33: must be even." in run(tmp_path, *SIGNALS, "length=33", code=2)
    said = run(tmp_path, "task=sgnal", code=2)
    assert "Did you mean 'signal'? There are: forecasting, restoration, segmentation, sig" in said
    (problem,) = run(tmp_path, *SIGNALS, "lenght=64", code=2).splitlines()[1:]
    assert problem == "  - lenght: there is no such key. Did you mean 'length'?"


def test_choices_of_another_task_are_refused(tmp_path):
    choices = ("hardware=8gb", "model=cnn", "loss=dice", "optimizer=sdg")
    output = run(tmp_path, SIGNALS[0], *choices, "task=signal", code=2)
    assert output.splitlines()[1:] == [
        "  - hardware=8gb: no such choice. There are: cpu, auto.",
        "  - model=cnn: no such choice. There are: tiny.",
        "  - loss=dice: no such choice. task=signal has none.",
        "  - optimizer=sdg: no such choice. Did you mean 'sgd'? There are: adamw, lamb, muon, nadamw, sgd.",
    ]
