"""benchmark=throughput: the real training and its evaluation, with data and without."""

import csv
import json
from pathlib import Path

import pytest
import torch

from segfit.errors import SegFitError
from segfit.tuning import throughput
from segfit.tuning.measure import explain_out_of_memory
from tests.integration.benchmarking import benchmark, compose_benchmark


@pytest.fixture(autouse=True)
def _small_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_SIDES", {"cpu": 64})
    monkeypatch.setattr(throughput, "_SECONDS", 0.01)


def test_what_is_measured_is_written_down(tmp_path: Path) -> None:
    done = benchmark(tmp_path, "throughput", "seconds=0.05", "benchmark.warmup=1", "accumulate=2")
    rows = done.table("throughput")
    assert [(row["pass"], row["batches"]) for row in rows] == [
        ("inference", "resident"),
        ("inference", "loaded"),
        ("training", "resident"),
        ("training", "loaded"),
    ]
    for row in rows:
        assert row["samples/s"] > 0
        assert 0 < row["p5"] <= row["ms"] <= row["p95"]
        assert 0 <= row["wait %"] < 100
        assert row["GiB"] > 0
    # memory of a process only grows: whatever is measured first must be what needs less
    assert [row["GiB"] for row in rows] == sorted(row["GiB"] for row in rows)
    results = json.loads((tmp_path / "results.json").read_text())
    costs = results["values"]["gflops_per_sample"]
    assert 2.5 < costs["training"] / costs["inference"] < 3.5
    for row, speed in zip(rows, results["values"]["speeds"], strict=True):
        assert speed["samples_per_second"] == row["samples/s"]
        gflops = costs[speed["pass"]] * speed["samples_per_second"]
        assert row["TFLOP/s"] == pytest.approx(gflops / 1e3)
        assert row["peak %"] == pytest.approx(
            100 * row["TFLOP/s"] / results["values"]["peak"]["teraflops"]
        )
    with (tmp_path / "throughput.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 4
    assert "64 × 64 matrix product" in done.findings.headline
    assert len(done.findings.scalars) == 4


def test_out_of_memory_is_reported_in_words() -> None:
    config = compose_benchmark("throughput", "batch_size=7")
    needed = pytest.raises(SegFitError, match=r"batch_size=7.*benchmark=max_batch")
    with needed, explain_out_of_memory(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(ZeroDivisionError), explain_out_of_memory(config):
        raise ZeroDivisionError
