"""benchmark=optimize: what is tried, what is kept, and the recipe that is written."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from segfit.assembly.training import make_training
from segfit.cli import main as cli
from segfit.cli.explain import explain
from segfit.config.check import check
from segfit.errors import SegFitError
from segfit.tuning import climb, max_batch, search
from segfit.tuning.change import augmentation_of
from segfit.tuning.max_batch import Trials
from segfit.tuning.optimize import MARK
from segfit.tuning.trial import Outcome
from tests.integration.benchmarking import Benchmarked, benchmark, outcome
from tests.integration.restoring import SMALL, picture, write
from tests.integration.training import TINY, command, compose_run, finished, one_thread
from tests.unit.composing import composed


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
            "augmentation": augmentation_of(config),
            "channels_last": config.channels_last,
            "precision": config.precision.name,
        }
        for name, value in on.items():
            rate *= self.factors.get(name, {}).get(value, 1.0)
        return outcome(rate)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that optimizes with scripted trials; the forecast says that everything fits."""
    monkeypatch.setattr(search, "native_precisions", lambda device: ["bf16", "fp32"])
    monkeypatch.setattr(Trials, "start", lambda trials, cap: cap)
    (tmp_path / "hardware").mkdir()

    def start(script: Any, *overrides: str, **how: Any) -> Benchmarked:
        monkeypatch.setattr(climb, "run_trial", script)
        out = tmp_path / "hardware" / "local.yaml"
        return benchmark(tmp_path, "optimize", f"benchmark.out={out}", *overrides, **how)

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
    assert verdicts["batch_size=2 × 4"] == search.SURPASSED
    assert verdicts["augmentation=kornia-gpu"] == "kept"
    for slower in ("data.cache=disk", "channels_last=false", "precision=fp32"):
        assert verdicts[slower] == "not faster"
    assert "loader.workers=0" not in verdicts  # it runs already
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
        if how["seconds"] > search.SECONDS:  # the comparison at the end
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


def test_without_time_nothing_is_planned(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(config: DictConfig, **how: Any) -> Outcome:
        time.sleep(0.3)
        return outcome(10.0)

    monkeypatch.setattr(Trials, "start", lambda trials, cap: pytest.fail("there is no time for it"))
    done = run(slow, *GROW, "benchmark.budget_minutes=0.01")
    assert done.table("trials")[-1]["verdict"] == climb.NO_TIME
    assert "there was no time" in done.findings.headline


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


def test_a_stale_recipe_is_reported_once(tmp_path: Path, run: Any) -> None:
    run(Scripted({4: 10.0, 8: 9.0}), "model.base_channels=8")
    now = composed_local(tmp_path, "model.base_channels=8")
    stale = composed_local(tmp_path, "model.base_channels=16")
    stale.hardware.tuned_for.torch = "1.0"
    reported: list[list[str]] = []
    for config in (now, stale):
        notices: list[str] = []
        with one_thread():
            make_training(config, tmp_path, notices.append)
        reported.append([line for line in notices if line.startswith("hardware=local")])
    assert reported[0] == []
    (line,) = reported[1]
    assert "model: then cnn base_channels=8, now cnn base_channels=16" in line
    assert f"torch: then 1.0, now {torch.__version__}" in line
    assert "device:" not in line


def test_without_a_recipe_the_error_says_how_to_get_one(
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

    monkeypatch.setattr(Trials, "start", lambda trials, cap: 2)
    monkeypatch.setattr(max_batch, "run_trial", fits)
    done = run(Scripted({1: 10.0, 2: 14.0, 4: 20.0}), "batch_size=1", "accumulate=8")
    assert max(asked) > 2
    assert done.findings.values["fitting"] == 2
    assert "batch_size=2 accumulate=4" in done.findings.values["changes"]


class Arithmetic(Scripted):
    """Stands for trainings whose time is their arithmetic; at 32 channels, 2 blocks and 64 pixels they are as `batches` says."""

    def __call__(self, config: DictConfig, **how: Any) -> Outcome:
        done = super().__call__(config, **how)
        if done.ok:
            model, size = config.model, config.image_size
            cost = (model.base_channels / 32) ** 2 * model.num_blocks / 2 * (size / 64) ** 2
            done.values["speed"]["samples_per_second"] /= cost
            done.values["facts"]["model"] = f"cnn {model.base_channels} {model.num_blocks}"
        return done


GROW = ("benchmark.grow=true", "model.base_channels=32", "batch_size=8")


def test_a_model_grows_while_its_speed_is_kept(tmp_path: Path, run: Any) -> None:
    done = run(Arithmetic({8: 100.0}), *GROW, "benchmark.min_speed=0.2", "data.resolution=128")
    (first, *rows) = done.table("trials")
    tried = [
        (row["setting"], row["verdict"])
        for row in rows
        if "model." in row["setting"] or "image" in row["setting"]
    ]
    assert first["samples/s"] == pytest.approx(100)
    assert tried == [
        ("model.base_channels=40", "kept"),
        ("model.num_blocks=3", "kept"),
        ("image_size=96", search.TOO_SLOW),
        ("model.base_channels=56", "kept"),
        ("model.num_blocks=5", search.TOO_SLOW),
        ("model.base_channels=72", search.TOO_SLOW),
    ]
    assert (
        "Grown to model.base_channels=56 model.num_blocks=3: cnn 56 3, 64 × 64 in place of cnn 32 2, 64 × 64"
        in done.findings.headline
    )
    assert "at 21.8 samples/s, 0.22 times 100.0." in done.findings.headline
    assert done.findings.values["grown"] == pytest.approx(21.77, abs=0.01)
    assert done.findings.values["fastest"] == pytest.approx(100)
    local = composed_local(tmp_path)
    assert (local.model.base_channels, local.model.num_blocks, local.image_size) == (56, 3, 64)
    assert (local.batch_size, local.accumulate) == (8, 1)


def test_samples_grow_up_to_what_the_data_has(run: Any) -> None:
    base = tuple(text for text in TINY if not text.startswith("model."))
    model = ("model=segformer_b0", "batch_size=8", "benchmark.grow=true")
    for resolution, sizes in ((96, {64, 96}), (64, {64})):
        free = Scripted({8: 100.0})
        run(free, *model, f"data.resolution={resolution}", base=base)
        assert {config.image_size for config in free.tried} == sizes


def test_what_grows_trains_in_smaller_micro_batches_up_to_its_limits(
    tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fits(config: DictConfig, **how: Any) -> Outcome:
        peak = config.batch_size * config.model.base_channels
        values = {"device": "cpu", "peak_bytes": peak, "limit_bytes": 320}
        return Outcome(ok=True, values={**values, "samples_per_second": 1.0})

    monkeypatch.setattr(
        Trials, "start", lambda trials, cap: min(cap, 320 // trials.config.model.base_channels)
    )
    monkeypatch.setattr(max_batch, "run_trial", fits)
    done = run(Scripted(dict.fromkeys((1, 2, 4, 8), 100.0)), *GROW)
    verdicts = {row["setting"]: row["verdict"] for row in done.table("trials")}
    assert verdicts["model.base_channels=40"] == "kept"
    assert verdicts["model.base_channels=56 batch_size=4 accumulate=2"] == "kept"
    assert verdicts["model.base_channels=368"] == "out of memory"
    assert "model.num_blocks=140: must be at most 100" in verdicts["model.num_blocks=140"]
    local = composed_local(tmp_path)
    assert (local.model.base_channels, local.model.num_blocks) == (296, 93)
    assert (local.batch_size, local.accumulate) == (1, 8)


def test_nothing_grows_that_is_too_slow(tmp_path: Path, run: Any) -> None:
    done = run(Arithmetic({8: 100.0}), *GROW, "benchmark.min_speed=1")
    assert "Nothing grew" in done.findings.headline
    assert done.findings.values["grown"] is None
    assert composed_local(tmp_path).model.base_channels == 32  # though it is not the usual number


@pytest.mark.parametrize("model", ["cnn", "nafnet"])
def test_a_restorer_grows_up_to_its_smallest_picture(tmp_path: Path, run: Any, model: str) -> None:
    for number, side in enumerate((160, 160, 72, 160, 160, 160)):  # of mixed sizes
        write(tmp_path / f"photos/{number}.png", picture(side, 160, seed=number))
    data = ("data=folder", f"data.root={tmp_path / 'photos'}", "data.split.val=0.2")
    options = (f"model={model}", "batch_size=4", "benchmark.effective_batch=4", GROW[0])
    script = Scripted({4: 100.0, 2: 100.0, 1: 100.0})
    done = run(script, *options, "model.base_channels=1000", *data, base=(*SMALL, *data))
    verdicts = {row["setting"]: row["verdict"] for row in done.table("trials")}
    grown = {name: text for name, text in verdicts.items() if name.startswith("patch_size")}
    assert [*grown] == ["patch_size=48", "patch_size=64", "patch_size=80"]
    assert grown["patch_size=48"] == grown["patch_size=64"] == "kept"
    assert "1 pictures are too small" in grown["patch_size=80"]
    assert "2.png (160×72, 80 needed)" in grown["patch_size=80"]
    assert max(config.patch_size for config in script.tried) == 64
    assert verdicts["model.num_blocks=2"] == "kept"
    local = composed(
        "task=restoration", f"hydra.searchpath=[file://{tmp_path}]", "hardware=local", *data
    )
    check(local)
    assert (local.model.name, local.model.base_channels) == (model, 1000)
    assert (local.model.num_blocks, local.patch_size, local.batch_size) == (93, 64, 4)


@pytest.mark.slow
def test_real_trainings_by_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "hardware").mkdir()
    out = tmp_path / "hardware" / "local.yaml"
    options = (
        *("benchmark=optimize", f"benchmark.out={out}", "batch_size=8", "data.resolution=96"),
        *("benchmark.grow=true", "benchmark.min_speed=0.7", "model.num_blocks=1"),
        *("augmentation=none", "data.cache=ram"),  # so that there is less to try
        *("seconds=0.01", "benchmark.warmup=0", "report.panels=0", "hydra.run.dir=found"),
    )
    last = {text.split("=")[0]: text for text in (*TINY, *options)}
    done = finished(command(*last.values(), script="tests/integration/in_process.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "found/results.json").read_text())["values"]
    composed, *tried = values["trials"]
    assert composed["change"]["name"] == "as composed"
    assert all(step["speed"]["samples_per_second"] > 0 for step in [composed, *tried])
    grown = [step for step in tried if step["change"]["name"].startswith(("model.", "image_size"))]
    assert len(grown) >= 3
    expected = {"model.base_channels": 8, "model.num_blocks": 1, "image_size": 64}
    for step in grown:
        kept = step["speed"]["samples_per_second"] >= 0.7 * values["composed"]
        assert step["verdict"] == ("kept" if kept else search.TOO_SLOW)
        expected |= step["change"]["options"] if kept else {}
    text = out.read_text()
    assert text.startswith("# @package _global_\n")
    written = composed_local(tmp_path)
    assert {key: OmegaConf.select(written, key) for key in expected} == expected
    size = expected["image_size"]
    assert written.hardware.tuned_for.sample == f"3 × {size} × {size}"
    assert ("Grown to" if values["grown"] else "Nothing grew") in text
