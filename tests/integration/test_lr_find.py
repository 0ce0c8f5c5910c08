"""benchmark=lr_find on the command line's composition."""

import json

import pytest

from segfit.errors import SegFitError
from segfit.tuning import lr_find
from segfit.tuning.lr_find import RangeTest
from tests.integration.benchmarking import benchmark

FAST = (
    "benchmark.updates=40",
    "benchmark.first=1e-5",
    "image_size=32",
    "data.resolution=32",
    "augmentation=none",
)


def test_a_rate_is_suggested_for_an_effective_batch(tmp_path):
    done = benchmark(tmp_path, "lr_find", *FAST, "batch_size=4", "accumulate=2", "lr=1e-3")
    values = done.findings.values
    assert values["effective_batch"] == 8
    assert 1e-4 < values["lr"] < 1
    assert values["override"] == f"lr={values['lr']:g}"
    assert (
        "holds for an effective batch of 8 (batch_size=4, accumulate=2), adamw"
        in done.findings.headline
    )
    rows = {row["where"]: row for row in done.table("rates")}
    assert rows["lr of the config"]["lr"] == 1e-3
    assert rows["steepest fall"]["lr"] < rows["lowest loss"]["lr"]
    assert rows["steepest fall"]["lr"] == pytest.approx(
        values["lr"], rel=0.05
    )  # two digits are shown
    assert done.progress[-1][1] == len(values["rates"]) == len(values["losses"])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["values"]["facts"]["batch"] == "4 × 2 accumulated = 8"
    assert (tmp_path / "lr_find.png").stat().st_size > 5000


def test_a_window_cannot_exceed_the_epoch(tmp_path):
    done = benchmark(
        tmp_path,
        "lr_find",
        *FAST,
        "data.train_size=8",
        "batch_size=4",
        "accumulate=64",
        "seconds=0.01",
    )
    assert done.findings.values["effective_batch"] == 8
    assert len(done.findings.values["rates"]) <= 20


def test_no_fall_is_reported_as_such(tmp_path, monkeypatch):
    rising = RangeTest([1e-4, 1e-3, 1e-2], [1.0, 1.1, 1.2], samples=4)
    monkeypatch.setattr(lr_find, "lr_range_test", lambda *_args, **_options: rising)
    done = benchmark(tmp_path, "lr_find", *FAST)
    assert done.findings.values["lr"] is None
    assert done.findings.headline.startswith("The loss never clearly falls in this sweep")


def test_contradicting_ends_are_reported(tmp_path):
    with pytest.raises(SegFitError, match=r"benchmark.first=1: must be below benchmark.last=0.1"):
        benchmark(tmp_path, "lr_find", "benchmark.first=1", "benchmark.last=0.1")
