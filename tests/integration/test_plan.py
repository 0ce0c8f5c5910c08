"""benchmark=plan: predicted memory against torch's own record of real steps, and the command that tells it.

On the CPU the record is the truth, to the byte, of all that goes through torch's allocator.
"""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.assembly.state import make_state
from segfit.assembly.tuned import model_label
from segfit.engine.evaluate import evaluate
from segfit.engine.precision import Precision
from segfit.engine.step import make_update
from segfit.system.cards import GIB, needs_of
from segfit.tasks.segmentation.assembly import make_task
from segfit.tasks.segmentation.planning import device_augmentation
from segfit.tasks.segmentation.schema import size_of
from segfit.tuning.measure import recorded_peak
from segfit.tuning.memory.planner import PARTS, Card, Forecast, forecast_of
from segfit.tuning.memory.predict import forecast, peak_bytes, predict, record
from tests.integration.benchmarking import benchmark, compose_benchmark
from tests.integration.training import ROOT, command, environment, train

CPU = torch.device("cpu")
SMALL = ("data=shapes", "augmentation=none", "hardware=cpu", "accumulate=1")
CNN = ("model=cnn", "model.base_channels=8", "model.num_blocks=1", "image_size=64", "batch_size=4")


def composed(*overrides: str) -> DictConfig:
    return compose_benchmark("plan", *overrides, base=SMALL)


def random_batch(config: DictConfig) -> dict[str, torch.Tensor]:
    count, (height, width) = config.batch_size, size_of(config.image_size)
    masks = torch.randint(0, config.data.num_classes, (count, height, width), dtype=torch.uint8)
    return {
        "image": torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8),
        "mask": masks,
        "index": torch.arange(count),
        "content": torch.tensor([[0, 0, height, width]] * count),
        "shape": torch.tensor([[height, width]] * count),
    }


def real_training_peak(config: DictConfig, precision: str) -> int:
    """Return torch's record of two real updates: the optimizer's state is there in the second."""
    names = ("image", "mask", "index")
    with recorded_peak(CPU) as peak:
        state, _ = make_state(config, CPU, Precision(precision, "cpu"), 1, lambda _: None)
        task = make_task(config, CPU)
        state.train()
        for _ in range(2):
            window = [
                {name: random_batch(config)[name] for name in names}
                for _ in range(config.accumulate)
            ]
            make_update(state, task, window, range(config.accumulate), config.clip_grad_norm)
            del window
    return peak.bytes


def real_validation_peak(config: DictConfig, precision: str) -> int:
    with recorded_peak(CPU) as peak:
        mode = Precision(precision, "cpu")
        state, _ = make_state(config, CPU, mode, 1, lambda _: None)
        evaluate(state.evaluated(), make_task(config, CPU), [random_batch(config)], mode)
    return peak.bytes


def predicted(config: DictConfig, precision: str, device_type: str = "cpu") -> Forecast:
    forecast = predict(config, device_type, precision, size_of(config.image_size))
    return forecast.accumulating(config.accumulate)


def recorded(config: DictConfig, precision: str, device_type: str = "cpu") -> NDArray[np.float64]:
    """Return what lives after each event of an update as it is recorded without data, (events, PARTS)."""
    one = record(config, Precision(precision, device_type), size_of(config.image_size), 1)
    return one.living[one.marks[0] : one.marks[-1]]


def weightless(model: str) -> list[str]:
    return [f"model={model}"] + ([] if model == "cnn" else ["model.weights=null"])


FAST = [
    ("segformer_b0", 224, 2, "fp32", 0.03, ()),
    ("segformer_b0", 64, 4, "bf16", 0.03, ()),  # the last stage's maps are smaller than its filters
    ("cnn", 128, 4, "bf16", 0.10, ("accumulate=3", "ema_decay=0.99")),
]
SLOW = [
    ("segformer_b0", 224, 2, "fp32", 0.05, ("freeze=encoder",)),
    *((model, size, batch, precision, within, ())
      for model, size, batch, within in (
          ("segformer_b2", 256, 4, 0.03), ("segformer_b0", 512, 4, 0.03),
          ("cnn", 256, 4, 0.10), ("timm_unet", 256, 4, 0.10))
      for precision in ("fp32", "bf16")),
    ("segformer_b0", 224, 2, "bf16", 0.03, ()),
    ("segformer_b0", 224, 2, "bf16", 0.06, ("model.checkpointing=true",)),  # found 5 % too low
    ("segformer_b0", 224, 2, "fp32", 0.03, ("model.fast=false",)),
    ("segformer_b2", 256, 4, "fp32", 0.03, ("model.checkpointing=true",)),
    ("segformer_b0", 256, 2, "fp32", 0.03, ("accumulate=3", "ema_decay=0.99", "optimizer.name=sgd")),
    ("segformer_b0", 256, 4, "fp32", 0.03, ("augmentation=cpu", "augmentation.mixup=1.0")),
    ("timm_unet", 256, 4, "fp32", 0.10, ("model.encoder=efficientnet_b0",)),
    ("timm_unet", 256, 4, "bf16", 0.10, ("model.encoder=convnext_atto",)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "size", "batch", "precision", "within", "options"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)],
)
def test_prediction_is_what_torch_records(model, size, batch, precision, within, options):
    config = composed(*weightless(model), f"image_size={size}", f"batch_size={batch}", *options)
    peak = predicted(config, precision).train.peak(batch)
    assert peak == pytest.approx(real_training_peak(config, precision), rel=within)


def test_frozen_layers_lower_the_forecast_and_the_measured_peak_alike():
    options = (*CNN, "image_size=128", "model.base_channels=16")

    def both(*more: str) -> tuple[float, float]:
        config = composed(*options, *more)
        return recorded(config, "fp32").sum(1).max(), real_training_peak(config, "fp32")

    whole, frozen = both(), both("freeze=encoder")
    saved = [before - after for before, after in zip(whole, frozen, strict=True)]
    assert saved[0] == pytest.approx(saved[1], rel=0.1)
    assert frozen[1] < 0.75 * whole[1]
    later = composed(*options, "freeze=encoder", "freeze_epochs=1")
    # what is needed once all is trained
    assert recorded(later, "fp32").sum(1).max() == whole[0]


@pytest.mark.parametrize("name", [path.stem for path in (ROOT / "conf/optimizer").glob("*.yaml")])
def test_every_optimizer_is_planned(name):
    config = composed(*CNN, f"optimizer={name}")
    peak = recorded(config, "fp32").sum(1).max()
    assert peak == pytest.approx(real_training_peak(config, "fp32"), rel=0.10)
    at_first = dict(zip(PARTS, recorded(config, "fp16", "cuda")[0], strict=True))
    moments = 1 if name in ("muon", "sgd") else 2
    assert at_first["optimizer"] == pytest.approx(moments * at_first["parameters"], rel=0.1)


@pytest.mark.parametrize(
    ("model", "precision"),
    [("cnn", "fp32"), pytest.param("segformer_b0", "bf16", marks=pytest.mark.slow)],
)
def test_validation_is_what_torch_records(model, precision):
    config = composed(*weightless(model), "image_size=128", "batch_size=4")
    parts = predicted(config, precision).val.at(4)
    del parts["optimizer"]  # the real one is evaluated before its first update
    assert sum(parts.values()) == pytest.approx(real_validation_peak(config, precision), rel=0.05)


def test_two_recordings_give_a_third():
    def at(batch: int):
        config = composed(*CNN, f"batch_size={batch}")
        return record(config, Precision("bf16", "cuda"), (64, 64), val_batch=batch)

    small, third, large = at(12), at(5), at(16)
    curves = forecast(small, large), forecast(third, large)
    for batch in (1, 5, 40):
        assert curves[0].train.peak(batch) == pytest.approx(curves[1].train.peak(batch), rel=0.002)
        assert curves[0].val.peak(batch) == pytest.approx(curves[1].val.peak(batch), rel=0.002)


# ------------------------------------------------------------------------- under CUDA's rules


def on_cuda(*overrides: str, precision: str = "bf16"):
    return predicted(composed(*CNN, *overrides), precision, "cuda")


@pytest.mark.slow
def test_what_costs_memory_costs_it_in_the_forecast():
    plain = on_cuda()
    parts = plain.train.at(8)
    weights = 4 * plain.parameters
    assert parts["parameters"] == pytest.approx(
        weights, rel=0.1
    )  # buffers, and blocks of 512 bytes
    assert parts["optimizer"] == pytest.approx(2 * weights, rel=0.1)
    fp32, fp16 = (on_cuda(precision=name).train.at(8)["activations"] for name in ("fp32", "fp16"))
    assert fp16 == pytest.approx(parts["activations"], rel=0.01)
    assert fp32 > 1.1 * fp16  # few channels: the batch itself is most of it
    assert on_cuda("ema_decay=0.99").train.at(8)["average"] == pytest.approx(weights, rel=0.1)
    assert on_cuda("accumulate=2").train.at(8)["gradients"] == pytest.approx(weights, rel=0.1)
    window = (
        24 * 64 * 64
    )  # bytes an image waits with: fp32 image, int64 mask, both as uint8, and copied ahead
    growth = on_cuda("accumulate=5").train.peak(8) - on_cuda("accumulate=4").train.peak(8)
    assert growth == pytest.approx(8 * (window + 4 * 64 * 64), rel=0.01)


def test_augmentation_on_the_device_is_counted():
    config = composed(*CNN, "augmentation=kornia-gpu")
    images_and_masks = 3 * 4 + 8
    work, share = device_augmentation(config)
    pixel = peak_bytes(work) * share / (64 * 64)
    assert 2 * images_and_masks < pixel < 12 * images_and_masks
    without = recorded(config, "bf16", "cuda").sum(1).max()
    assert predicted(config, "bf16", "cuda").train.peak(4) >= 0.95 * without


@pytest.mark.slow
def test_checkpointing_and_the_fast_model_pay():
    def peak(*options: str) -> float:
        config = composed("model=segformer_b0", "image_size=128", *options)
        return predicted(config, "bf16", "cuda").train.peak(8)

    assert peak("model.checkpointing=true") < 0.75 * peak() < 0.75 * peak("model.fast=false")


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["hardware={}", "experiment=fill_{}"])
@pytest.mark.parametrize("tier", ["4gb", "8gb", "12gb", "24gb"])
def test_every_recipe_fits_its_card_and_needs_what_the_table_says(tier, choice):
    config = compose_benchmark("plan", choice.format(tier), base=("data=shapes",))
    card = Card("cuda", config.hardware.vram_gb)
    peak = forecast_of(config, "cuda").peak(config.batch_size)
    assert peak <= card.budget
    share = card.needed(peak) / GIB / card.gib
    assert "hardware" in choice or 0.74 < share < 0.87
    numbers = 3 * math.prod(size_of(config.image_size))
    needs = needs_of("segmentation", model_label(config))
    known = needs.gib(numbers, config.batch_size, config.accumulate)
    # python docs/benchmarks/cards.py makes the table anew
    assert known == pytest.approx(share * card.gib, rel=0.05)


def test_trainings_go_on_as_if_nothing_had_been_recorded(tmp_path):
    before = train(tmp_path / "before").losses
    on_cuda("ema_decay=0.99", "accumulate=2", precision="fp16")
    predicted(composed(*CNN), "fp32")
    assert train(tmp_path / "after").losses == before
    assert not torch.is_inference_mode_enabled()


# ----------------------------------------------------------------------------- what it answers


def test_the_answer_and_its_parts(tmp_path):
    answer = benchmark(tmp_path, "plan", *CNN, "hardware=8gb", base=SMALL)
    values = answer.findings.values
    assert values["fits"]
    assert answer.findings.headline.startswith("cnn, 64 × 64, bf16, batch 4: needs ")
    parts = {row["part"]: row["update, GiB"] for row in answer.table("parts")}
    assert sum(list(parts.values())[:-4]) == pytest.approx(parts["allocated"])
    assert parts["needed of 8 GB"] == pytest.approx(
        parts["allocated"] + parts["margin of 10%"] + parts["CUDA context"]
    )
    fitting = [row["batch"] for row in answer.table("batches") if row["fits"]]
    assert max(fitting) == values["largest_batch"] > 4096
    assert "levers" not in [table.name for table in answer.findings.tables]


def test_what_does_not_fit_is_reported_with_what_helps(tmp_path):
    options = ("hardware=4gb", "batch_size=3000", "precision=fp32")
    answer = benchmark(tmp_path, "plan", *CNN, *options, base=SMALL)
    assert "does NOT fit" in answer.findings.headline
    levers = {row["change"].split("=")[0]: row for row in answer.table("levers")}
    assert {"batch_size", "precision"} <= levers.keys()
    smaller = levers["batch_size"]
    assert smaller["fits"]
    batch, accumulate = (int(part.split("=")[1]) for part in smaller["change"].split())
    assert batch * accumulate >= 3000
    assert levers["precision"]["needed, GiB"] < answer.findings.scalars["plan/needed_gib"]


def test_a_card_that_is_too_small_for_anything_is_no_crash(tmp_path):
    options = ("benchmark.tiers=[0.5,4]", "benchmark.sizes=[32,64]", "benchmark.models=[cnn]")
    answer = benchmark(tmp_path, "plan", *CNN, *options, base=SMALL)
    rows = answer.table("largest")
    assert [row["sample"] for row in rows] == ["32 × 32", "64 × 64"]
    assert all(row["0.5 GB"] == 0 for row in rows)
    assert rows[0]["4 GB"] > rows[1]["4 GB"] > 0


@pytest.mark.slow
def test_a_remembered_answer_needs_no_torch(tmp_path):
    options = ["benchmark=plan", *CNN, "data=shapes", "hardware=8gb", "augmentation=none"]
    cache = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    said = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", *command(*options, script="benchmark.py")[1:]],
            cwd=tmp_path, env={**environment(), **cache}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        said.append((done.stdout.splitlines()[-1], done.stderr))
    assert said[0][0] == said[1][0]
    names = [{line.split("|")[-1].strip() for line in errors.splitlines()} for _, errors in said]
    assert "torch" in names[0]
    assert not names[1] & {"torch", "transformers", "timm", "kornia", "matplotlib"}
