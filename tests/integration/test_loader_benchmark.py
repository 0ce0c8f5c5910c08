"""benchmark=loader: the grid, the choice, and a real measurement of few settings."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from segfit.assembly.task import assembly_of
from segfit.errors import SegFitError
from segfit.tuning import Bench, loader
from segfit.tuning.change import changed
from segfit.tuning.loader import Fed, choose, dali_batches, grid, worker_counts
from tests.integration.benchmarking import benchmark, compose_benchmark
from tests.unit.data.files import write_pairs


def fed(
    data: float,
    model: float = 100.0,
    place: str = "cpu",
    cache: str = "none",
    workers: int = 1,
    prefetch: int | None = None,
) -> Fed:
    return Fed(place, cache, workers, prefetch, data, model)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [0, 1]), (2, [0, 1, 2]), (6, [0, 1, 2, 4, 6]), (16, [0, 1, 2, 4, 8, 16])],
)
def test_worker_counts(count: int, expected: list[int]) -> None:
    assert worker_counts(count) == expected


def test_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_cores", lambda: 2)
    ways = list(grid(compose_benchmark("loader")))
    # two places × two caches × (no worker, and two counts × two prefetches)
    assert len(ways) == len(set(ways)) == 2 * 2 * (1 + 2 * 2)
    assert {way.prefetch for way in ways if way.workers == 0} == {None}
    assert ways[0].change.typed == "augmentation=cpu data.cache=none loader.workers=0"
    without = grid(compose_benchmark("loader", "augmentation=none", "benchmark.workers=[3]"))
    assert {(way.augmentation, way.workers) for way in without} == {("none", 3)}


@pytest.mark.parametrize(
    "options", [("task=restoration",), ("task=forecasting", "data.place=loader")]
)
def test_other_tasks_have_the_options_that_are_tried(options: tuple[str, ...]) -> None:
    config = compose_benchmark("loader", *options, "benchmark.workers=[0,1]", base=())
    ways = list(grid(config))
    assert len(ways) == len(set(ways)) > 1
    for way in ways:
        changed(config, way.change.options)


def test_what_needs_no_loader_says_so() -> None:
    with pytest.raises(SegFitError, match=r"no data side to measure: windows are gathered"):
        list(grid(compose_benchmark("loader", "task=forecasting", base=())))


def test_the_smallest_that_outruns_is_chosen() -> None:
    few = fed(101, workers=1, prefetch=2)
    cached = fed(500, workers=1, prefetch=2, cache="disk")
    many = fed(900, workers=4, prefetch=2)
    more_ahead = fed(120, workers=1, prefetch=4)
    too_slow = fed(99)
    assert choose([many, cached, more_ahead, few, too_slow]) == few
    assert choose([too_slow, many, cached]) == cached  # a cache costs less than three processes


def test_the_faster_model_is_fed() -> None:
    on_device = fed(500, model=80.0, place="kornia-gpu")
    in_workers = fed(150, model=100.0, workers=8, prefetch=4)
    assert choose([on_device, in_workers]) == in_workers
    starved = fed(90, model=100.0, workers=8, prefetch=4)
    assert choose([on_device, starved]) == on_device


def test_where_nothing_outruns_the_most_is_reached() -> None:
    slow, less_slow = fed(10), fed(30, workers=2, prefetch=2)
    assert choose([slow, less_slow]) == less_slow
    assert "No setting outruns the model" in loader.headline(less_slow, "cuda")
    assert "waits 70 %" in loader.headline(less_slow, "cuda")


def test_without_workers_data_and_model_take_turns() -> None:
    alone = fed(300, workers=0)
    assert alone.reached == pytest.approx(75)  # 1/300 + 1/100 s an image
    assert not alone.outruns
    assert "waits 25 %" in loader.headline(alone, "cuda")
    slower, faster = fed(70, workers=1, prefetch=2), fed(101, workers=2, prefetch=2)
    assert choose([alone, slower]) == alone
    assert choose([alone, faster]) == faster


def test_a_real_measurement(tmp_path: Path) -> None:
    done = benchmark(
        tmp_path,
        "loader",
        "seconds=0.02",
        "benchmark.workers=[0,1]",
        "benchmark.prefetch=[2]",
        "benchmark.caches=[ram]",
        "benchmark.warmup=1",
        "report.panels=0",
    )
    rows = done.table("loader")
    assert len(rows) == 2 * 2
    assert all(row["samples/s"] > 0 for row in rows)
    for row in rows:
        assert row["outruns"] == (row["workers"] > 0 and row["× model"] > 1)
        assert 0 < row["training samples/s"] <= row["samples/s"]
    with (tmp_path / "loader.csv").open() as file:
        places = [row["augmentation"] for row in csv.DictReader(file)]
    assert places == ["cpu"] * 2 + ["kornia-gpu"] * 2
    results = json.loads((tmp_path / "results.json").read_text())
    typed = results["values"]["overrides"]
    assert typed.startswith("augmentation=")
    assert typed in done.findings.headline
    assert len(results["values"]["settings"]) == 4
    assert done.progress[-1][1:] == (5, 6)  # two places and four settings


def on_files(root: Path) -> tuple[str, ...]:
    return ("data=folder", f"data.root={root}", "data.num_classes=3", "model=cnn", "hardware=cpu")


def test_dali_that_is_asked_for_and_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setattr(loader, "measure_training", pytest.fail)  # before anything is measured
    config = compose_benchmark("loader", "benchmark.dali=true")
    with pytest.raises(SegFitError, match=r"needs DALI: pip install -r requirements-dali\.txt"):
        loader.run(config, Bench(Path(), pytest.fail, pytest.fail))


def test_dali_has_nothing_for_a_task_without_an_image_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "find_spec", lambda name: True)
    config = compose_benchmark("loader", "task=restoration", "benchmark.dali=true", base=())
    with pytest.raises(SegFitError, match="task=restoration cannot be fed by DALI"):
        loader.run(config, Bench(Path(), pytest.fail, pytest.fail))


def test_dali_is_a_contestant_when_it_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    root = write_pairs(tmp_path / "data", list("abcdefgh"), suffix=".jpg")
    few = (
        "benchmark.dali=true",
        "seconds=0.02",
        "augmentation=none",
        "benchmark.workers=[0,1]",
        "benchmark.caches=[none]",
    )
    done = benchmark(tmp_path, "loader", *few, "image_size=32", base=on_files(root))
    (row,) = done.table("dali")
    assert row["threads"] == 1
    assert row["samples/s"] > 0
    drawn = benchmark(tmp_path, "loader", *few)
    assert "left out: DALI: the samples are no image files." in drawn.notices


def test_dali_decodes_what_pillow_does(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    root = write_pairs(tmp_path / "data", ["a", "b"], size=(40, 48), suffix=".jpg")
    config = compose_benchmark("loader", base=on_files(root))
    source = assembly_of(config).make_sources(config)["train"]
    images, masks = next(dali_batches(source, (40, 48), 1, 1, torch.device("cpu")))
    for found, folder in ((images.at(0), "images"), (masks.at(0)[..., 0], "masks")):
        known = [np.asarray(Image.open(path)) for path in (root / folder).iterdir()]
        assert any(np.array_equal(found, one) for one in known)
