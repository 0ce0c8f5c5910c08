"""benchmark=max_batch: the batch of an exhaustive scan, whatever happens to the trials."""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from segfit.data.images import largest_first
from segfit.errors import SegFitError
from segfit.system.cards import GIB
from segfit.tasks.segmentation.assembly import make_sources
from segfit.tuning import Bench, max_batch
from segfit.tuning.max_batch import Trials
from segfit.tuning.measure import fits, trial_config
from segfit.tuning.memory.planner import CONTEXT, Curve, Forecast
from segfit.tuning.trial import Outcome, run_trial
from tests.integration.benchmarking import benchmark, compose_benchmark
from tests.integration.training import ROOT, TINY, one_thread

IMAGES, ANSWER = 8, 5
_CURVE = Curve([[[GIB], [GIB]]])
A_GIB_EACH = Forecast(_CURVE, _CURVE, 1, waiting=[0, 0], recorded=1, fixed_val=False)
SMALL = (
    "image_size=32",
    "batch_size=2",
    "data.resolution=32",
    f"data.train_size={IMAGES}",
    f"data.val_size={IMAGES}",
)


def peaks(*overrides: str, base: tuple[str, ...] = TINY) -> list[int]:
    """Return the peak of every batch up to that of all images, in this process."""
    config = compose_benchmark("max_batch", *overrides, base=base)
    found = []
    for batch in (1, *range(1, IMAGES + 1)):  # the first also allocates what the process keeps
        with one_thread():
            arguments = {"budget_gb": 1, "margin": 0.1, "rounds": 1, "seconds": 0.0}
            values = fits(trial_config(config, batch), largest=list(range(batch)), **arguments)
        found.append(values["peak_bytes"])
    return found[1:]


def budget_for(answer: int, found: list[int]) -> str:
    """Return a budget of which nine tenths lie between the peaks of `answer` and of the next batch."""
    return f"benchmark.budget_gb={(found[answer - 1] + found[answer]) / 2 / 0.9 / GIB}"


def in_this_process(config: Any, *, job: str, timeout_s: float, **arguments: Any) -> Outcome:
    assert job == "segfit.tuning.measure:fits"
    return Outcome(ok=True, values=fits(config, **arguments))


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int, int], Outcome]], None]:
    """Replace trials by a function of (batch, trials before it)."""

    def plant(of: Callable[[int, int], Outcome]) -> None:
        tried: list[int] = []

        def no_forecast(*_arguments: Any, **_options: Any) -> Any:
            raise SegFitError("not here")

        monkeypatch.setattr(
            max_batch, "forecast_of", no_forecast
        )  # so that batch_size says where to start

        def run_trial(config: Any, **_arguments: Any) -> Outcome:
            tried.append(config.batch_size)
            return of(config.batch_size, len(tried) - 1)

        monkeypatch.setattr(max_batch, "run_trial", run_trial)

    return plant


def ok(batch: int, *, device: str = "cpu", speed: float = 10.0) -> Outcome:
    values = {
        "device": device,
        "peak_bytes": (1 + batch) * GIB,
        "limit_bytes": 100 * GIB,
        "samples_per_second": speed,
    }
    return Outcome(ok=True, values=values, seconds=1.5)


def failed(reason: str, message: str = "because") -> Outcome:
    return Outcome(ok=False, reason=reason, message=message)


@pytest.mark.slow
def test_the_answer_is_that_of_an_exhaustive_scan(tmp_path, monkeypatch):
    monkeypatch.setattr(max_batch, "run_trial", in_this_process)
    overrides = (*SMALL, "model.base_channels=4")
    found = peaks(*overrides)
    assert found == sorted(found)
    done = benchmark(tmp_path, "max_batch", *overrides, budget_for(ANSWER, found))
    values = done.findings.values
    assert (values["batch_size"], values["override"]) == (ANSWER, f"batch_size={ANSWER}")
    assert "batch_size=5: the largest that trains here" in done.findings.headline
    assert "10% kept free" in done.findings.headline
    assert "The effective batch is then 5, no longer 2" in done.findings.headline
    rows = done.table("trials")
    for row in rows:
        # What one record leaves behind in this process the next one sees; processes agree to the byte.
        assert abs(row["peak GiB"] * GIB - found[row["batch_size"] - 1]) <= 1024
        assert row["verdict"] == ("fits" if row["batch_size"] <= ANSWER else "over the budget")
    assert rows[-1]["batch_size"] == ANSWER  # verified
    assert abs(rows[0]["batch_size"] - ANSWER) <= 1  # by forecast; batch_size is 2
    assert done.notices == []
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["values"]["trials"][-1]["fits"] is True
    assert "once more and longer" in done.progress[-1][0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        ("model=cnn", "model.base_channels=8", "augmentation=kornia-gpu", "precision=bf16"),
        ("model=segformer_b0", "augmentation=none", "ema_decay=0.9"),
        ("model=timm_unet", "model.encoder=resnet18", "augmentation.mixup=0.5"),
    ],
    ids=lambda model: model[0],
)
def test_processes_find_what_a_scan_finds(tmp_path, model):
    base = tuple(text for text in TINY if not text.startswith("model."))
    overrides = (*SMALL, "data.train_size=6", "image_size=64", *model)
    config = compose_benchmark("max_batch", *overrides, "benchmark.budget_gb=1", base=base)
    trials = Trials(config, Bench(tmp_path, print, lambda *_: None), list(range(6)))
    scanned = [trials.tries(batch) for batch in range(1, 7)]
    found = [round((item.peak_gib or 0.0) * GIB) for item in scanned]
    done = benchmark(tmp_path, "max_batch", *overrides, budget_for(4, found), base=base)
    assert done.findings.values["batch_size"] == 4
    for row in done.table("trials")[:-1]:  # to the byte
        assert round(row["peak GiB"] * GIB) == found[row["batch_size"] - 1]


def test_everything_fits(tmp_path, outcomes):
    outcomes(lambda batch, _: ok(batch))
    done = benchmark(tmp_path, "max_batch", "data.train_size=24", "batch_size=8")
    assert [row["batch_size"] for row in done.table("trials")] == [2, 8, 24, 24]
    assert done.findings.headline.startswith(
        "batch_size=24: all 24 training samples fit in one batch"
    )


def test_the_search_starts_at_the_forecast(tmp_path, monkeypatch):
    def first(*overrides: str) -> int:
        config = compose_benchmark("max_batch", *overrides)
        trials = Trials(config, Bench(tmp_path, print, lambda *_: None), [])
        return trials.start(cap=24)

    monkeypatch.setattr(max_batch, "forecast_of", lambda *_arguments, **_options: A_GIB_EACH)
    assert first("benchmark.budget_gb=11", "benchmark.margin=0") == 10
    assert first("benchmark.budget_gb=11", "benchmark.margin=0.2") == 7
    assert first("benchmark.budget_gb=100") == 24
    assert first("benchmark.budget_gb=0.1") == 0


def test_a_card_that_nvml_does_not_know_is_asked_by_torch(tmp_path, monkeypatch):
    card = torch.device("cuda", 0)
    monkeypatch.setattr(max_batch, "resolve_device", lambda _: (card, None))
    memory = SimpleNamespace(total_memory=8 * GIB + CONTEXT)
    monkeypatch.setattr(torch.cuda, "get_device_properties", {card: memory}.__getitem__)
    monkeypatch.setattr(max_batch, "forecast_of", lambda *_arguments, **_options: A_GIB_EACH)
    config = compose_benchmark("max_batch", "benchmark.margin=0")
    trials = Trials(config, Bench(tmp_path, print, lambda *_: None), [])
    assert trials.start(cap=24) == 7


def test_without_a_forecast_the_search_starts_at_batch_size(tmp_path, outcomes):
    outcomes(lambda batch, _: ok(batch))
    done = benchmark(tmp_path, "max_batch", "data.train_size=24", "batch_size=5")
    assert done.table("trials")[0]["batch_size"] == 5
    assert done.notices == ["no forecast, so the search starts at batch_size: not here"]


def test_nothing_fits(tmp_path, outcomes):
    outcomes(lambda batch, _: failed("oom"))
    done = benchmark(tmp_path, "max_batch", "batch_size=8")
    assert [row["batch_size"] for row in done.table("trials")] == [2, 1]
    assert done.findings.headline.startswith(
        "Not even one sample trains here (out of memory). Lower"
    )
    assert done.findings.values["override"] is None


def test_what_fails_when_verified_is_not_the_answer(tmp_path, outcomes):
    seen: list[int] = []

    def of(batch: int, _: int) -> Outcome:
        seen.append(batch)
        return failed("oom") if batch > 5 or (batch == 5 and seen.count(5) > 1) else ok(batch)

    outcomes(of)
    done = benchmark(tmp_path, "max_batch", "batch_size=4")
    assert done.findings.values["batch_size"] == 4
    assert seen[-2:] == [5, 4]


def test_host_memory_that_the_driver_lends_does_not_count(tmp_path, outcomes):
    outcomes(lambda batch, _: ok(batch, device="cuda", speed=100.0 if batch <= 6 else 30.0))
    done = benchmark(tmp_path, "max_batch", "batch_size=8")
    assert done.findings.values["batch_size"] == 6
    verdicts = {row["batch_size"]: row["verdict"] for row in done.table("trials")}
    assert verdicts[8] == "3.3 times slower a sample than smaller batches: spilled into host memory"
    assert verdicts[6] == "fits"


def test_a_crash_is_tried_again_and_then_counts(tmp_path, outcomes):
    outcomes(
        lambda batch, number: (
            failed("crash", "killed by SIGKILL") if number == 0 or batch > 5 else ok(batch)
        )
    )
    done = benchmark(tmp_path, "max_batch", "batch_size=4")
    assert done.findings.values["batch_size"] == 5
    rows = [(row["batch_size"], row["verdict"]) for row in done.table("trials")]
    assert rows[:2] == [(4, "killed by SIGKILL"), (4, "fits")]
    assert rows.count((6, "killed by SIGKILL")) == 2


def test_a_training_that_cannot_even_start_is_reported(tmp_path, outcomes):
    outcomes(lambda batch, _: failed("input", "one\ntwo"))
    with pytest.raises(SegFitError) as error:
        benchmark(tmp_path, "max_batch")
    assert error.value.problems == ["batch_size=4: one", "batch_size=4: two"]
    outcomes(lambda batch, _: failed("crash", "ValueError: a bug"))
    done = benchmark(tmp_path, "max_batch")
    assert done.findings.headline == "Not even one sample trains here: ValueError: a bug"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_process_is_survived(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("SEGFIT_TEST_KILLED", str(tmp_path / "killed"))
    dying = {"job": "tests.unit.tuning.jobs:fits_the_second_time"}
    monkeypatch.setattr(
        max_batch, "run_trial", lambda config, **how: run_trial(config, **how | dying)
    )
    done = benchmark(tmp_path, "max_batch", *SMALL, "data.train_size=1", "benchmark.budget_gb=1")
    verdicts = [row["verdict"] for row in done.table("trials")]
    assert verdicts[0].startswith("killed by SIGKILL")
    assert verdicts[1:] == ["fits", "fits"]
    assert done.findings.values["batch_size"] == 1


def test_a_trial_is_the_dearest_that_may_happen():
    config = compose_benchmark(
        "max_batch", "model=segformer_b0", "augmentation=kornia-gpu", "augmentation.hflip=0",
        "augmentation.cutmix=0.3", "loss.class_weights=balanced", base=(),
    )  # fmt: skip
    dearest = trial_config(config, 7)
    assert (dearest.batch_size, dearest.model.weights, dearest.loader.workers) == (7, None, 0)
    assert dearest.augmentation.hflip == 0
    assert dearest.augmentation.blur == dearest.augmentation.affine == 1
    assert (dearest.augmentation.mixup, dearest.augmentation.cutmix) == (1, 0)
    assert dearest.loss.class_weights == [1.0] * 4
    assert config.batch_size != 7  # a copy


def test_the_largest_held_out_images_are_found(tmp_path):
    from PIL import Image

    for folder in ("images", "masks"):
        for split in ("train", "val"):
            (tmp_path / split / folder).mkdir(parents=True)
            for number, side in enumerate([20, 50, 30]):
                mode = "RGB" if folder == "images" else "L"
                Image.new(mode, (side, 40)).save(tmp_path / split / folder / f"{number}.png")
    config = compose_benchmark(
        "max_batch", "data=folder", f"data.root={tmp_path}", "data.num_classes=2", base=()
    )
    assert largest_first(make_sources(config)["val"]) == [1, 2, 0]
    assert largest_first(make_sources(compose_benchmark("max_batch"))["val"]) == list(range(6))
