"""Memory over the batch size, and what is remembered of it."""

import math
from typing import Any

import pytest

from segfit.system.cards import GIB, Gpu
from segfit.tasks.segmentation.schema import held_out_shape
from segfit.tuning.memory import planner, predict
from segfit.tuning.memory.planner import (
    CONTEXT,
    MARGIN,
    PARTS,
    Card,
    Curve,
    Forecast,
    card_of,
    forecast_of,
    planned_precision,
)
from tests.integration.benchmarking import compose_benchmark


def moment(fixed: dict[str, float], each: dict[str, float]) -> list[list[float]]:
    return [[side.get(part, 0.0) for part in PARTS] for side in (fixed, each)]


FORWARD = moment({"parameters": 100.0}, {"activations": 10.0})
STEP = moment({"parameters": 100.0, "gradients": 100.0}, {"activations": 1.0})


def a_forecast(**changes: Any) -> Forecast:
    values = {
        "train": Curve([FORWARD, STEP]),
        "val": Curve([moment({"parameters": 100.0}, {"activations": 4.0})]),
        "parameters": 25,
        "waiting": [5.0, 2.0],
        "recorded": 1,
        "fixed_val": False,
    }
    return Forecast(**{**values, **changes})


def test_the_peak_moves_with_the_batch():
    curve = Curve([FORWARD, STEP])
    assert curve.peak(1) == 201
    assert curve.at(1) == {"parameters": 100, "gradients": 100, "activations": 1}
    assert curve.peak(100) == 1100
    assert curve.at(100) == {"parameters": 100, "activations": 1000}


@pytest.mark.parametrize("budget", [0, 99, 100, 200, 201, 219.9, 300, 1e6])
def test_the_largest_batch_is_the_last_that_fits(budget):
    forecast = a_forecast()
    largest = int(forecast.largest(budget))
    fitting = [batch for batch in range(1, largest + 100) if forecast.peak(batch) <= budget]
    assert fitting == list(range(1, largest + 1))


def test_what_no_image_adds_to_fits_any_batch_or_none():
    flat = Curve([moment({"parameters": 10.0}, {})])
    assert flat.largest(10) == math.inf
    assert flat.largest(9) == 0


def test_a_card_keeps_context_and_margin_free():
    card = Card("cuda", 8)
    assert card.needed(card.budget) == pytest.approx(8 * GIB)
    assert card.budget == pytest.approx((8 * GIB - CONTEXT) / (1 + MARGIN))


def test_each_micro_batch_more_waits():
    forecast = a_forecast(recorded=2)
    assert forecast.accumulating(2) == forecast
    longer = forecast.accumulating(5)
    assert longer.train.peak(100) == forecast.train.peak(100) + 3 * (5 + 2 * 100)
    assert longer.val == forecast.val


# ------------------------------------------------------------------------------- remembering


@pytest.fixture
def predicted(tmp_path, monkeypatch):
    """The times that a forecast was worked out; the cache folder is `tmp_path`."""
    times: list[int] = []
    monkeypatch.setattr(predict, "predict", lambda *_: times.append(1) or a_forecast())
    monkeypatch.setattr(planner, "default_cache_dir", lambda: tmp_path)
    return times


def test_what_was_predicted_is_remembered(predicted):
    config = compose_benchmark("plan")
    assert forecast_of(config, "cuda") == forecast_of(config, "cuda") == a_forecast()
    assert len(predicted) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"train": 3}', "\x00"])
def test_what_cannot_be_read_is_predicted_anew(tmp_path, predicted, content):
    config = compose_benchmark("plan")
    forecast_of(config, "cuda")
    (saved,) = (tmp_path / "memory").iterdir()
    saved.write_text(content)
    assert forecast_of(config, "cuda") == a_forecast()
    assert len(predicted) == 2


def test_no_room_to_remember_is_no_error(tmp_path, predicted):
    (tmp_path / "memory").write_text("")
    assert forecast_of(compose_benchmark("plan"), "cuda") == a_forecast()


def key_of(*overrides: str, device_type: str = "cuda", precision: str = "bf16") -> str:
    return planner.key(compose_benchmark("plan", *overrides), device_type, precision, (64, 64))


@pytest.mark.parametrize(
    "same", ["batch_size=7", "lr=0.1", "seed=3", "data.train_size=9", "loader.workers=1", "device=cuda",
     "scheduler.warmup=0.1"]
)  # fmt: skip
def test_what_memory_does_not_depend_on_is_remembered(same):
    assert key_of(same) == key_of()


@pytest.mark.parametrize(
    "other",
    [
        "model.base_channels=16", "image_size=96",
        "accumulate=2", "loss=dice",
        "ema_decay=0.99", "optimizer.name=sgd", "augmentation.mixup=0.5", "channels_last=false",
    ],
)  # fmt: skip
def test_what_memory_depends_on_is_not(other):
    assert key_of(other) != key_of()


def test_long_windows_share_a_recording():
    assert key_of("accumulate=8") == key_of("accumulate=2") != key_of("accumulate=1")


def test_precision_and_device_are_part_of_the_key():
    assert key_of(precision="fp32") != key_of()
    assert key_of(device_type="cpu") != key_of()


# ------------------------------------------------------------------------------ what is planned


@pytest.mark.parametrize(
    ("visible", "gib", "name"),
    [([], 12.0, "12 GB"), ([10.0, 24.0], 10.0, "10 GB"), ([24.0], 12.0, "12 GB")],
)
def test_the_card_is_the_recipes_unless_the_one_here_is_smaller(monkeypatch, visible, gib, name):
    gpus = [Gpu(size, "") for size in visible]
    monkeypatch.setattr(planner, "visible_gpus", lambda: gpus)
    card = card_of(compose_benchmark("plan", "hardware=12gb", "device=auto"))
    assert (card.device_type, card.gib, card.name) == ("cuda", gib, name)


def test_without_a_card_the_ram_is_planned():
    assert card_of(compose_benchmark("plan", "hardware=cpu")).device_type == "cpu"
    assert card_of(compose_benchmark("plan", "hardware=8gb", "device=cpu")).device_type == "cpu"


@pytest.mark.parametrize(
    ("asked", "device_type", "runs"),
    [("auto", "cuda", "bf16"), ("fp16", "cuda", "fp16"), ("fp32", "cuda", "fp32"), ("fp32", "cpu", "fp32")],
)  # fmt: skip
def test_precision(asked, device_type, runs):
    assert planned_precision(compose_benchmark("plan", f"precision={asked}"), device_type) == runs


def test_the_size_of_held_out_images():
    assert held_out_shape(compose_benchmark("plan", "data.resolution=77")) == (77, 77)
    assert held_out_shape(compose_benchmark("plan", "benchmark.original_size=[50,60]")) == (50, 60)
    folder = ("data=folder", "data.root=x", "data.num_classes=2", "image_size=64")
    base = ("model=cnn", "batch_size=2", "epochs=1")
    assert held_out_shape(compose_benchmark("plan", *folder, base=base)) == (64, 64)
    crop = compose_benchmark("plan", *folder, "data.fit=crop", base=base)
    assert held_out_shape(crop) == (128, 128)
