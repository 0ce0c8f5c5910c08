"""benchmark=segformer: ours against transformers', by turns."""

from pathlib import Path

import pytest

from segfit.errors import SegFitError
from tests.integration.benchmarking import benchmark, compose_benchmark
from tests.integration.training import TINY

ANY_MODEL = tuple(text for text in TINY if not text.startswith("model"))


def test_both_are_measured_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = benchmark(
        tmp_path,
        "segformer",
        "model=segformer_b0",
        "image_size=32",
        "batch_size=2",
        "benchmark.precisions=[bf16]",
        "benchmark.rounds=3",
        base=ANY_MODEL,
    )
    assert not [text for text in capfd.readouterr() if "profiler" in text or "ERROR" in text]
    speeds = done.table("speed")
    assert [(row["precision"], row["pass"]) for row in speeds] == [
        ("bf16", "training"),
        ("bf16", "inference"),
    ]
    for row in speeds:
        assert row["times faster"] == pytest.approx(row["stock ms"] / row["fast ms"])
        assert 0 < row["p5"] <= row["p95"]
    for row in done.table("memory"):
        # weights, gradients and AdamW's state of 3.7 M parameters alone take 16 bytes each
        assert 0 < row["of the step alone"] < 1.5
        assert 0.05 < min(row["fast peak GiB"], row["stock peak GiB"]) < 0.5


def test_other_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SegFitError, match="segformer_b0"):
        benchmark(tmp_path, "segformer", "model=cnn")
    assert (
        compose_benchmark("segformer", "model=segformer_b3", base=ANY_MODEL).model.variant == "b3"
    )
