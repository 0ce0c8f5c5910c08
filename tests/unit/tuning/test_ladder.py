"""Which rungs a machine has is decided from facts alone."""

from typing import Any

import pytest
from omegaconf import DictConfig

from segfit.tuning.change import Change
from segfit.tuning.ladder import naive, rungs, with_batch
from tests.integration.benchmarking import compose_benchmark

Machine = dict[str, Any]
CPU = {"device_type": "cpu", "precisions": ("bf16", "fp32"), "workers": 2, "samples": 367}
OLD_CPU = CPU | {"precisions": ("fp32",), "workers": 0}
CARD = CPU | {"device_type": "cuda", "precisions": ("fp16", "fp32"), "workers": 8}


def composed(*overrides: str) -> DictConfig:
    base = ("hardware=cpu", "data=shapes", "batch_size=2", "image_size=64")
    return compose_benchmark("ladder", *overrides, base=base)


def by_name(config: DictConfig, machine: Machine) -> dict[str, Change]:
    return {rung.name: rung for rung, _ in rungs(config, **machine)}


def missing_of(config: DictConfig, machine: Machine) -> dict[str, str]:
    return {rung.name: missing for rung, missing in rungs(config, **machine) if missing}


def test_the_lowest_rung_switches_everything_off() -> None:
    options = naive(composed("augmentation=kornia-gpu")).options
    assert options["precision"] == "fp32"
    assert options["augmentation"] == "cpu"
    assert options["loader.workers"] == 0
    for key in ("pin_memory", "persistent", "non_blocking"):
        assert options[f"loader.{key}"] is False
    for key in ("model.fast", "channels_last", "compile"):
        assert options[key] is False
    assert "batch_size" not in options
    assert "model.fast" not in naive(composed("model=cnn")).options
    assert "augmentation" not in naive(composed("augmentation=none")).options


def test_every_rung_undoes_something_of_the_lowest_or_raises_the_batch() -> None:
    config = composed("augmentation=kornia-gpu")
    lowest = naive(config).options
    changed = {key for rung, _ in rungs(config, **CARD) for key in rung.options}
    assert changed == {*lowest, "batch_size"}


def test_the_published_order() -> None:
    assert list(by_name(composed(), CARD)) == [
        "mixed precision (fp16)",
        "batch 8",
        "8 data workers",
        "pinned memory, copies beside the step",
        "decoded cache",
        "augmentation on the device",
        "fast SegFormer",
        "channels_last",
        "compile",
    ]


def test_only_a_card_pins_and_overlaps() -> None:
    name = "pinned memory, copies beside the step"
    assert by_name(composed(), CARD)[name].options == {
        "loader.pin_memory": True,
        "loader.non_blocking": True,
    }
    assert "no card" in missing_of(composed(), CPU)[name]
    assert by_name(composed(), CPU)["2 data workers"].options == {
        "loader.workers": 2,
        "loader.persistent": True,
    }


def test_what_a_machine_or_model_lacks_is_named() -> None:
    config = composed("model=cnn", "augmentation=none", "benchmark.batch_size=2")
    missing = missing_of(config, OLD_CPU)
    assert set(missing) == {
        "mixed precision",
        "larger batch",
        "data workers",
        "pinned memory, copies beside the step",
        "augmentation on the device",
        "fast SegFormer",
    }
    assert "no native bf16 or fp16" in missing["mixed precision"]
    assert "model.name=cnn" in missing["fast SegFormer"]


@pytest.mark.parametrize(
    ("overrides", "samples", "expected"),
    [
        ([], 367, {"batch_size": 8}),
        ([], 5, {"batch_size": 5}),
        (["benchmark.batch_size=3"], 367, {"batch_size": 3}),
        (["accumulate=4"], 367, {"batch_size": 8, "accumulate": 1}),
        (["accumulate=8"], 367, {"batch_size": 8, "accumulate": 2}),
    ],
)
def test_the_larger_batch(overrides: list[str], samples: int, expected: dict[str, int]) -> None:
    machine = CPU | {"precisions": ("fp32",), "workers": 1, "samples": samples}
    assert rungs(composed(*overrides), **machine)[1][0].options == expected


def test_a_halved_batch_keeps_the_effective_one() -> None:
    assert with_batch(composed("accumulate=8"), 4).options == {"batch_size": 4, "accumulate": 4}


def test_changes_as_they_are_typed() -> None:
    change = Change("", {"precision": "bf16", "model.fast": True, "image_size": [64, 96]})
    assert change.typed == "precision=bf16 model.fast=true image_size=[64,96]"


def test_series_have_rungs_of_their_own() -> None:
    base = ("task=forecasting", "hardware=cpu", "model=lstm", "batch_size=128")
    config = compose_benchmark("ladder", base=base)
    machine = CPU | {"samples": 5000}
    assert naive(config).options["data.place"] == "loader"
    found, missing = by_name(config, machine), missing_of(config, machine)
    assert [name for name in found if name not in missing] == [
        "mixed precision (bf16)",
        "batch 512",
        "batch 1024",
        "windows on the device",
    ]
    assert "nn.LSTM" in missing["compile"]
    few = by_name(config, CPU | {"samples": 600})
    assert "batch 512" in few
    assert "batch 1024" not in few
