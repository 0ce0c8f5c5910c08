"""benchmark=plan of restoration against torch's own record of real steps; see test_plan.py."""

import pytest
import torch

from segfit.assembly.state import make_state
from segfit.engine.evaluate import evaluate
from segfit.engine.precision import Precision
from segfit.engine.step import make_update
from segfit.tasks.restoration.assembly import make_task
from segfit.tasks.restoration.planning import costliest
from segfit.tasks.restoration.schema import channels_of
from segfit.tuning.measure import recorded_peak
from segfit.tuning.memory.predict import predict
from tests.integration.benchmarking import compose_benchmark

CPU = torch.device("cpu")
BASE = ("task=restoration", "hardware=cpu", "data=shapes", "device=cpu")
PERCEPTUAL = ("loss.perceptual=0.1", "loss.encoder=resnet18")


def window(config) -> list[dict[str, torch.Tensor]]:
    size, side = config.batch_size, config.patch_size
    return [
        {
            "target": torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8),
            "seed": torch.arange(size),
            "index": torch.arange(size),
        }
        for _ in range(config.accumulate)
    ]


def real_peak(config, precision: str) -> int:
    """Return torch's record of two real updates: the optimizer's state is there in the second."""
    config, mode = costliest(config), Precision(precision, "cpu")
    config.precision.name = precision
    with recorded_peak(CPU) as peak:
        state, _ = make_state(config, CPU, mode, 1, lambda _: None)
        task = make_task(config, CPU)
        state.model.train()
        for _ in range(2):
            make_update(
                state, task, window(config), range(config.accumulate), config.clip_grad_norm
            )
    return peak.bytes


@pytest.mark.parametrize(
    ("model", "precision", "options"),
    [
        ("cnn", "fp32", ()),
        ("cnn", "bf16", PERCEPTUAL),
        pytest.param("nafnet", "bf16", (), marks=pytest.mark.slow),
        ("nafnet", "fp32", (*PERCEPTUAL, "accumulate=2")),
        ("cnn", "fp32", ("degrade=mixed", "model.checkpointing=true")),
    ],
)
def test_prediction_is_what_torch_records(model, precision, options):
    sizes = ("model.base_channels=16", "model.num_blocks=2", "patch_size=96", "batch_size=4")
    config = compose_benchmark("plan", f"model={model}", *sizes, *options, base=BASE)
    side = config.data.resolution
    forecast = predict(config, "cpu", precision, (side, side)).accumulating(config.accumulate)
    assert forecast.train.peak(4) == pytest.approx(real_peak(config, precision), rel=0.05)


def real_validation_peak(config) -> int:
    config, mode = costliest(config), Precision("fp32", "cpu")
    shape = (1, channels_of(config), config.data.resolution, config.data.resolution)
    with recorded_peak(CPU) as peak:
        state, _ = make_state(config, CPU, mode, 1, lambda _: None)
        batch = {
            "input": torch.rand(shape),
            "target": torch.zeros(shape, dtype=torch.uint8),
            "index": torch.arange(1),
        }
        evaluate(state.evaluated(), make_task(config, CPU), [batch], mode)
    return peak.bytes


@pytest.mark.parametrize(
    "options", [("model=cnn",), ("model=nafnet",), ("model=cnn", "data.image_mode=gray")]
)
def test_validation_is_what_torch_records(options):
    sizes = ("model.base_channels=8", "model.num_blocks=1", "patch_size=96", "batch_size=4")
    config = compose_benchmark("plan", *options, *sizes, base=BASE)
    side = config.data.resolution
    parts = predict(config, "cpu", "fp32", (side, side)).val.at(1)
    del parts["optimizer"]  # the real one is evaluated before its first update
    assert sum(parts.values()) == pytest.approx(real_validation_peak(config), rel=0.05)
