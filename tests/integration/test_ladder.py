"""benchmark=ladder: which rungs are kept, which left out, and what is written down."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image

from segfit.assembly import state as build_state
from segfit.assembly.training import make_training
from segfit.errors import SegFitError
from segfit.report.files import png
from segfit.tuning import climb, ladder
from segfit.tuning.measure import measure_training
from segfit.tuning.trial import Outcome
from tests.integration.benchmarking import benchmark, outcome
from tests.integration.training import compose_run, one_thread

QUICK = ("seconds=0.01", "benchmark.warmup=1", "report.panels=0")


class Scripted:
    """Stands for child processes: how fast a training is depends on what is switched on.

    Args:
        **faster: key with _ for . → factor on 10 images a second; an Outcome ends the trial so.
    """

    def __init__(self, **faster: Any) -> None:
        self.faster = faster
        self.tried: list[DictConfig] = []

    def __call__(self, config: DictConfig, **how: Any) -> Outcome:
        self.tried.append(config)
        rate = 10.0
        on = {
            "workers": config.loader.workers > 0,
            "cache": config.data.cache != "none",
            "kornia": config.augmentation.name == "kornia-gpu",
            "channels_last": config.channels_last,
            "compile": config.compile,
            "batch": config.batch_size > 4,
        }
        for name, switched in on.items():
            factor = self.faster.get(name, 1.5)
            if switched and isinstance(factor, Outcome):
                return factor
            rate *= factor if switched else 1.0
        return outcome(rate, "yes" if config.compile else "no")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Any:
    def start(**faster: Any) -> Scripted:
        script = Scripted(**faster)
        monkeypatch.setattr(climb, "run_trial", script)
        monkeypatch.setattr(ladder, "native_precisions", lambda device: ["fp32"])
        return script

    return start


def test_a_rung_that_is_slower_is_shown_and_left_off(tmp_path: Path, scripted: Any) -> None:
    script = scripted(workers=0.5)
    done = benchmark(tmp_path, "ladder", "benchmark.workers=2")
    rows = {row["rung"]: row for row in done.table("ladder")}
    assert rows["2 data workers"]["kept"] is False
    assert rows["2 data workers"]["× before"] == pytest.approx(0.5)
    assert all(row["kept"] for name, row in rows.items() if name != "2 data workers")
    assert rows["compile"]["× before"] == pytest.approx(1.5)
    workers = [config.loader.workers for config in script.tried]
    assert workers.count(2) == 1  # on its own rung, and no longer above it
    assert script.tried[-1].data.cache == "disk"
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["values"]["gain"] == pytest.approx(rows["compile"]["× naive"])
    typed = results["values"]["overrides"]
    assert "loader.workers" not in typed
    assert "batch_size=16" in typed
    assert "augmentation=kornia-gpu" in typed
    assert typed in done.findings.headline


def test_rungs_that_cannot_be_done_are_named_and_left_out(tmp_path: Path, scripted: Any) -> None:
    full = Outcome(ok=False, reason="input", message="data.cache=disk: the disk is full")
    scripted(cache=full, compile=Outcome(ok=False, reason="timeout", message="not done after 9 s"))
    done = benchmark(tmp_path, "ladder")
    missing = {row["rung"]: row["left out because"] for row in done.table("left-out")}
    assert missing["decoded cache"] == full.message
    assert missing["compile"] == "not done after 9 s"
    assert "is no SegFormer" in missing["fast SegFormer"]
    assert not {row["rung"] for row in done.table("ladder")} & set(missing)
    assert any(line.startswith("decoded cache: left out") for line in done.notices)


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, scripted: Any) -> None:
    script = scripted(batch=Outcome(ok=False, reason="oom", message="OutOfMemoryError"))
    done = benchmark(tmp_path, "ladder", "benchmark.batch_size=20")
    sizes = [config.batch_size for config in script.tried]
    assert sorted(set(sizes)) == [4, 5, 10, 20]
    assert sizes[-1] == 4
    missing = {row["rung"]: row["left out because"] for row in done.table("left-out")}
    assert missing["batch 5"] == "out of memory"


def test_a_training_that_cannot_start_is_an_error(tmp_path: Path, monkeypatch: Any) -> None:
    broken = Outcome(ok=False, reason="input", message="data.root=x: no such folder")
    monkeypatch.setattr(climb, "run_trial", lambda config, **how: broken)
    with pytest.raises(SegFitError, match=r"lowest rung.*no such folder"):
        benchmark(tmp_path, "ladder")


def test_nothing_helps(tmp_path: Path, scripted: Any) -> None:
    names = ("workers", "cache", "kornia", "channels_last", "compile", "batch")
    scripted(**dict.fromkeys(names, 0.9))
    done = benchmark(tmp_path, "ladder", "benchmark.workers=1")
    assert [row["kept"] for row in done.table("ladder")] == [True] + [False] * 6
    assert done.findings.headline == "Nothing is faster than the naive 10.0 samples/s here."
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["values"]["gain"], results["values"]["overrides"]) == (1.0, "")


def test_real_trainings_climb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure every rung for real, but in this process, and without a compiler."""
    seen: list[tuple[str, dict[str, str]]] = []

    def in_process(config: DictConfig, *, job: str, timeout_s: float, **how: Any) -> Outcome:
        assert job == "segfit.tuning.measure:measure_training"
        values = measure_training(config, **how)
        seen.append((config.precision.name, values["facts"]))
        return Outcome(ok=True, values=values)

    reason = "compile=true: torch.compile failed, running eager (no compiler)."
    monkeypatch.setattr(climb, "run_trial", in_process)
    monkeypatch.setattr(build_state, "compiled_or_eager", lambda model, *_: (model, reason))
    done = benchmark(tmp_path, "ladder", *QUICK, "benchmark.workers=1", "benchmark.cache=ram")
    assert seen[0][0] == "fp32"
    assert seen[0][1]["batch"] == "4"
    assert {facts["augmentation"] for _, facts in seen} == {"cpu", "kornia-gpu"}
    assert {facts["workers"] for _, facts in seen} == {"0", "1"}
    missing = {row["rung"]: row["left out because"] for row in done.table("left-out")}
    assert "no compiler" in missing["compile"]
    with (tmp_path / "ladder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["rung"] == "naive"
    assert all(float(row["samples/s"]) > 0 for row in rows)
    assert (tmp_path / "ladder.png").stat().st_size > 5000
    picture = np.asarray(Image.open(io.BytesIO(png(done.findings.figures["ladder"]))))
    assert picture.std() > 10
    assert set(done.findings.scalars) == {f"ladder/{row['rung']}" for row in rows}


def test_blocking_copies_reach_the_loader(tmp_path: Path) -> None:
    with one_thread():
        training = make_training(compose_run("loader.non_blocking=false"), tmp_path, print)
    held_out = training.fit.held_out()
    for batches in (training.fit.train.batches, held_out):
        assert batches.non_blocking is False  # type: ignore[union-attr]
