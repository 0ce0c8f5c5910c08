"""Which rungs a machine has is decided from facts alone."""

import pytest
from omegaconf import DictConfig

from segfit.tuning.rungs import Machine, Rung, naive, rungs, typed, with_batch
from tests.integration.benchmarking import compose_benchmark

CPU = Machine("cpu", ("bf16", "fp32"), workers=2, images=367)
OLD_CPU = Machine("cpu", ("fp32",), workers=0, images=367)
CARD = Machine("cuda", ("fp16", "fp32"), workers=8, images=367)


def composed(*overrides: str) -> DictConfig:
    base = ("hardware=cpu", "data=shapes", "batch_size=2", "image_size=64")
    return compose_benchmark("ladder", *overrides, base=base)


def by_name(config: DictConfig, machine: Machine) -> dict[str, Rung]:
    return {rung.name: rung for rung in rungs(config, machine)}


def test_the_lowest_rung_switches_everything_off() -> None:
    changes = naive(composed("augmentation=kornia-gpu")).changes
    assert changes["precision.name"] == "fp32"
    assert changes["augmentation.name"] == "cpu"
    assert changes["loader.workers"] == 0
    for key in ("pin_memory", "persistent", "non_blocking"):
        assert changes[f"loader.{key}"] is False
    for key in ("model.fast", "channels_last", "compile"):
        assert changes[key] is False
    assert "batch_size" not in changes
    assert "model.fast" not in naive(composed("model=cnn")).changes
    assert "augmentation.name" not in naive(composed("augmentation=none")).changes


def test_every_rung_undoes_something_of_the_lowest_or_raises_the_batch() -> None:
    config = composed("augmentation=kornia-gpu")
    lowest = naive(config).changes
    changed = {key for rung in rungs(config, CARD) for key in rung.changes}
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
    assert by_name(composed(), CARD)[name].changes == {
        "loader.pin_memory": True,
        "loader.non_blocking": True,
    }
    assert "no card" in by_name(composed(), CPU)[name].missing
    assert by_name(composed(), CPU)["2 data workers"].changes == {
        "loader.workers": 2,
        "loader.persistent": True,
    }


def test_what_a_machine_or_model_lacks_is_named() -> None:
    config = composed("model=cnn", "augmentation=none", "benchmark.batch_size=2")
    missing = {rung.name: rung.missing for rung in rungs(config, OLD_CPU) if rung.missing}
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
    ("overrides", "images", "expected"),
    [
        ([], 367, {"batch_size": 8}),
        ([], 5, {"batch_size": 5}),
        (["benchmark.batch_size=3"], 367, {"batch_size": 3}),
        (["accumulate=4"], 367, {"batch_size": 8, "accumulate": 1}),
        (["accumulate=8"], 367, {"batch_size": 8, "accumulate": 2}),
    ],
)
def test_the_larger_batch(overrides: list[str], images: int, expected: dict[str, int]) -> None:
    machine = Machine("cpu", ("fp32",), workers=1, images=images)
    assert rungs(composed(*overrides), machine)[1].changes == expected


def test_a_halved_batch_keeps_the_effective_one() -> None:
    assert with_batch(composed("accumulate=8"), 4).changes == {"batch_size": 4, "accumulate": 4}


def test_changes_as_they_are_typed() -> None:
    changes = {"precision.name": "bf16", "augmentation.name": "kornia-gpu", "model.fast": True}
    assert typed(changes) == "precision=bf16 augmentation=kornia-gpu model.fast=true"
