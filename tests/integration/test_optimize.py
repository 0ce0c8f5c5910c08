"""benchmark=optimize: what is tried, what is kept, and the recipe that is written."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig

from segfit.assembly.training import make_training
from segfit.cli import main as cli
from segfit.cli.explain import explain
from segfit.errors import SegFitError
from segfit.tuning import climb, max_batch, optimize
from segfit.tuning.local_recipe import MARK
from segfit.tuning.measure import measure_training
from segfit.tuning.trial import Outcome
from tests.integration.benchmarking import Benchmarked, benchmark, outcome
from tests.integration.training import TINY, compose_run, one_thread


class Scripted:
    """Stands for child processes: how fast a training is depends on its settings.

    Args:
        batches: micro-batch → images a second; one that is not there is out of memory.
        **factors: key with _ for . → value → factor.
    """

    def __init__(self, batches: dict[int, float], **factors: dict[Any, float]) -> None:
        self.batches = batches
        self.factors = factors
        self.tried: list[DictConfig] = []

    def __call__(self, config: DictConfig, *, timeout_s: float, **how: Any) -> Outcome:
        self.tried.append(config)
        rate = self.batches.get(config.batch_size)
        if rate is None:
            return Outcome(ok=False, reason="oom", message="OutOfMemoryError")
        on = {
            "workers": config.loader.workers,
            "cache": config.data.cache,
            "augmentation": config.augmentation.name,
            "channels_last": config.channels_last,
            "precision": config.precision.name,
        }
        for name, value in on.items():
            rate *= self.factors.get(name, {}).get(value, 1.0)
        return outcome(rate)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that optimizes with scripted trials; the forecast says that everything fits."""
    monkeypatch.setattr(optimize, "native_precisions", lambda device: ["bf16", "fp32"])
    monkeypatch.setattr(optimize, "start", lambda trials, cap: cap)
    (tmp_path / "hardware").mkdir()

    def start(script: Any, *overrides: str) -> Benchmarked:
        monkeypatch.setattr(climb, "run_trial", script)
        out = tmp_path / "hardware" / "local.yaml"
        return benchmark(tmp_path, "optimize", f"benchmark.out={out}", *overrides)

    return start


def composed_local(folder: Path, *overrides: str) -> DictConfig:
    """Compose hardware=local of `folder` for a training on tiny data; only data comes from the command line."""
    data = tuple(text for text in TINY if text.startswith(("data", "device")))
    return compose_run(
        f"hydra.searchpath=[file://{folder}]", "hardware=local", *overrides, base=data
    )


def test_what_is_faster_is_kept_and_composes(tmp_path: Path, run: Any) -> None:
    script = Scripted(
        {1: 10.0, 2: 14.0, 4: 16.0, 8: 15.0},
        augmentation={"kornia-gpu": 1.2},
        cache={"disk": 0.8},
        channels_last={False: 0.9},
        precision={"fp32": 0.7},
    )
    done = run(script, "batch_size=1", "augmentation=cpu")
    verdicts = {row["setting"]: row["verdict"] for row in done.table("trials")}
    assert verdicts["batch_size=4 × 2"] == "kept"
    assert verdicts["batch_size=2 × 4"] == optimize.SURPASSED
    assert verdicts["augmentation=kornia-gpu"] == "kept"
    for slower in ("data.cache=disk", "channels_last=false", "precision=fp32"):
        assert verdicts[slower] == "not faster"
    values = json.loads((tmp_path / "results.json").read_text())["values"]
    assert values["gain"] == pytest.approx(1.92)
    assert values["changes"] == "batch_size=4 accumulate=2 augmentation=kornia-gpu"
    local = composed_local(tmp_path)
    assert (local.batch_size, local.accumulate, local.image_size) == (4, 2, 64)
    assert (local.model.name, local.augmentation.name) == ("cnn", "kornia-gpu")
    assert (local.data.cache, local.channels_last, local.loader.workers) == ("none", True, 0)
    assert (local.hardware.name, local.epochs) == ("local", 2)
    assert composed_local(tmp_path, "batch_size=2").batch_size == 2  # the command line wins
    assert (tmp_path / "optimize.png").stat().st_size > 5000
    assert "effective batch is 8, no longer 1" in done.findings.headline


def test_the_effective_batch_stays(tmp_path: Path, run: Any) -> None:
    script = Scripted({1: 5.0, 2: 8.0, 3: 9.0, 6: 11.0, 12: 12.0})
    done = run(script, "batch_size=3", "accumulate=4")
    assert {config.batch_size * config.accumulate for config in script.tried} == {12}
    local = composed_local(tmp_path)
    assert (local.batch_size, local.accumulate) == (12, 1)
    assert "effective batch" not in done.findings.headline


def test_a_recipe_that_does_not_fit_gets_a_smaller_micro_batch(tmp_path: Path, run: Any) -> None:
    done = run(Scripted({1: 5.0, 2: 8.0}), "batch_size=8")
    local = composed_local(tmp_path)
    assert (local.batch_size, local.accumulate) == (2, 4)
    assert done.table("trials")[0]["verdict"] == "out of memory"
    assert "does not fit" in done.findings.headline


def test_nothing_is_faster(tmp_path: Path, run: Any) -> None:
    done = run(Scripted({1: 10.0, 2: 10.0, 4: 10.0, 8: 10.0}), "batch_size=8")
    assert "Nothing was found" in done.findings.headline
    assert [row["verdict"] for row in done.table("trials")].count("kept") == 1
    assert composed_local(tmp_path).batch_size == 8


def test_what_only_seemed_faster_is_not_written(tmp_path: Path, run: Any) -> None:
    script = Scripted({4: 10.0, 8: 20.0})

    def later_slower(config: DictConfig, **how: Any) -> Outcome:
        if how["seconds"] > optimize.SECONDS:  # the comparison at the end
            script.batches = {4: 12.0, 8: 11.0}
        return script(config, **how)

    run(later_slower, "batch_size=4")
    assert composed_local(tmp_path).batch_size == 4


def test_the_time_is_kept(run: Any) -> None:
    script = Scripted({1: 10.0, 2: 14.0, 4: 18.0, 8: 25.0})
    limits: list[float] = []

    def slow(config: DictConfig, **how: Any) -> Outcome:
        limits.append(how["timeout_s"])
        time.sleep(0.3)
        return script(config, **how)

    done = run(slow, "batch_size=1", "seconds=0.001", "benchmark.budget_minutes=0.03")
    verdicts = [row["verdict"] for row in done.table("trials")]
    assert climb.NO_TIME in verdicts
    assert len(script.tried) < 6
    assert max(limits) <= 1.8
    assert (done.findings.values["gain"] or 0) >= 1


def test_a_foreign_file_is_not_overwritten(tmp_path: Path, run: Any) -> None:
    out = tmp_path / "hardware" / "local.yaml"
    out.write_text("# mine\n")
    script = Scripted({4: 10.0})
    with pytest.raises(SegFitError, match="did not write it"):
        run(script)
    assert not script.tried
    assert out.read_text() == "# mine\n"
    out.write_text(f"{MARK}\n")
    run(script, "batch_size=4", "benchmark.effective_batch=4")
    assert "tuned_for" in out.read_text()
    assert [path.name for path in out.parent.iterdir()] == ["local.yaml"]


def test_a_stale_recipe_is_told_once(tmp_path: Path, run: Any) -> None:
    run(Scripted({4: 10.0, 8: 9.0}), "model.base_channels=8")
    now = composed_local(tmp_path, "model.base_channels=8")
    stale = composed_local(tmp_path, "model.base_channels=16")
    stale.hardware.tuned_for.torch = "1.0"
    told: list[list[str]] = []
    for config in (now, stale):
        notices: list[str] = []
        with one_thread():
            make_training(config, tmp_path, notices.append)
        told.append([line for line in notices if line.startswith("hardware=local")])
    assert told[0] == []
    (line,) = told[1]
    assert "model: then cnn base_channels=8, now cnn base_channels=16" in line
    assert f"torch: then 1.0, now {torch.__version__}" in line
    assert "device:" not in line


def test_without_a_recipe_the_way_to_one_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (cli.CONF / "hardware" / "local.yaml").exists():
        pytest.skip("this machine has one")
    with pytest.raises(Exception, match="local") as caught:
        compose_run("hardware=local")
    (problem,) = explain(caught.value, cli.CONF, "train", ["hardware=local"])
    assert "benchmark=optimize" in problem


def test_a_search_decides_where_the_forecast_does_not(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def fits(config: DictConfig, **how: Any) -> Outcome:
        asked.append(config.batch_size)
        values = {
            "device": "cpu",
            "peak_bytes": config.batch_size,
            "limit_bytes": 2,
            "samples_per_second": 1.0,
        }
        return Outcome(ok=True, values=values)

    monkeypatch.setattr(optimize, "start", lambda trials, cap: 2)
    monkeypatch.setattr(max_batch, "run_trial", fits)
    done = run(Scripted({1: 10.0, 2: 14.0, 4: 20.0}), "batch_size=1", "accumulate=8")
    assert max(asked) > 2
    assert done.findings.values["fitting"] == 2
    assert "batch_size=2 accumulate=4" in done.findings.values["changes"]


@pytest.mark.slow
def test_real_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure every setting for real, but in this process."""

    def in_process(config: DictConfig, *, job: str, timeout_s: float, **how: Any) -> Outcome:
        return Outcome(ok=True, values=measure_training(config, **how))

    monkeypatch.setattr(climb, "run_trial", in_process)
    out = tmp_path / "local.yaml"
    quick = ("seconds=0.05", "benchmark.warmup=1", "report.panels=0", "batch_size=1")
    done = benchmark(tmp_path, "optimize", f"benchmark.out={out}", *quick)
    rows = done.table("trials")
    assert rows[0]["setting"] == "as composed"
    assert all(row["samples/s"] > 0 for row in rows)
    written = yaml.safe_load(out.read_text())
    assert written["batch_size"] * written["accumulate"] in (1, 8)
    assert written["hardware"]["tuned_for"]["image_size"] == "64 × 64"
    text = out.read_text()
    assert text.startswith("# @package _global_\n")
    assert done.findings.values["gain"] >= 1
