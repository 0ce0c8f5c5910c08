"""Arithmetic is counted by hand where it can be, and by torch's counter where it is right."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from segfit.assembly.training import Training, make_training
from segfit.engine.precision import Precision
from segfit.tuning import throughput
from tests.integration.training import TINY, compose_run, one_thread

SIDE, CHANNELS, BATCH = 10, 12, 3


def backward_flops(layer: nn.Module) -> int:
    """Return what is counted of a layer's backward pass, by our formula."""
    inputs = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    output = layer(inputs).sum()
    with throughput._counter() as counter:
        output.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("groups", [1, 3, CHANNELS])
def test_backward_of_grouped_convolutions_by_hand(groups: int) -> None:
    layer = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=groups)
    a_gradient = 2 * BATCH * SIDE**2 * 9 * CHANNELS * CHANNELS // groups
    assert backward_flops(layer) == 2 * a_gradient  # of the input and of the weight


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(CHANNELS, 7, 3, padding=1),
        nn.Conv2d(CHANNELS, 7, 3, stride=2),
        nn.ConvTranspose2d(CHANNELS, 7, 2, stride=2),
    ],
)
def test_dense_convolutions_as_torch_counts_them(layer: nn.Module) -> None:
    inputs = torch.randn(BATCH, CHANNELS, SIDE, SIDE, requires_grad=True)
    output = layer(inputs).sum()
    with FlopCounterMode(display=False) as counter:
        output.backward()
    assert backward_flops(layer) == counter.get_total_flops() > 0


def test_an_lstm_by_hand() -> None:
    layers, units, columns = 2, 8, 5
    model = nn.LSTM(columns, units, layers, batch_first=True)
    series = torch.randn(BATCH, 7, columns)
    by_hand = 2 * BATCH * 7 * 4 * units * (columns + units + (layers - 1) * 2 * units)
    with throughput._counter() as counter:
        outputs = model(series)[0].sum()
        assert counter.get_total_flops() == by_hand
        outputs.backward()
    assert counter.get_total_flops() == 3 * by_hand
    weights = [list(part.shape) for part in model.parameters()]
    assert throughput.lstm_flops(list(series.shape), weights) == by_hand  # as cuDNN gets them


def build(folder: Path, *overrides: str, base: tuple[str, ...] = TINY) -> Training:
    config = compose_run("report.panels=0", "augmentation=none", *overrides, base=base)
    with one_thread():
        return make_training(config, folder, print)


@pytest.mark.parametrize("model", ["cnn", "segformer_b0"])
def test_an_update_costs_about_three_forwards(model: str, tmp_path: Path) -> None:
    if model == "cnn":
        training = build(tmp_path)
    else:
        without_cnn = tuple(text for text in TINY if not text.startswith("model"))
        training = build(tmp_path, f"model={model}", "model.weights=null", base=without_cnn)
    forward, update = throughput.inference_flops(training), throughput.update_flops(training)
    assert 2.5 * forward < update <= 3 * forward * 1.001


def test_accumulation_leaves_the_cost_of_an_image(tmp_path: Path) -> None:
    costs = [
        throughput.update_flops(build(tmp_path, *overrides))
        for overrides in (["batch_size=4"], ["batch_size=2", "accumulate=2"])
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "expected"),
    [
        ("NVIDIA H200", "bf16", True, 989.4),
        ("NVIDIA A100-SXM4-40GB", "fp32", True, 156.0),
        ("NVIDIA A100-SXM4-40GB", "fp32", False, 19.5),
        ("Tesla T4", "fp32", True, 8.1),
        ("NVIDIA GeForce RTX 4090", "fp16", True, 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "fp16", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, None),
        ("NVIDIA Something New", "bf16", True, None),
    ],
)
def test_data_sheets(name: str, precision: str, tf32: bool, expected: float | None) -> None:
    assert throughput.data_sheet(name, precision, tf32=tf32) == expected


def test_a_cpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "_SIDES", {"cpu": 64})
    monkeypatch.setattr(throughput, "_SECONDS", 0.01)
    teraflops, source = throughput.peak_rate(torch.device("cpu"), Precision("fp32", "cpu"))
    assert teraflops > 0
    assert "64 × 64" in source
