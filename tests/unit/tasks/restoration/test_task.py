"""Whole pictures by a meter: what is scored, shown and restored in tiles, and what lies on the card meanwhile."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from segfit.engine.precision import Precision
from segfit.models.restorers import make_restorer
from segfit.tasks.restoration.losses import RestorationLoss
from segfit.tasks.restoration.schema import LossConfig, ScoreConfig
from segfit.tasks.restoration.task import RestorationTask, panel_of
from segfit.tasks.scored import checked_metrics
from tests.fakes.card import DEVICE, card, tensors_of

CPU = torch.device("cpu")


def task_of(device: torch.device = CPU, **options: Any) -> RestorationTask:
    return RestorationTask(
        criterion=RestorationLoss(LossConfig("l1"), Precision("fp32", device.type)),
        degrade=lambda targets, _: targets,
        scores=ScoreConfig(),
        tiles_at_once=2,
        device=device,
        **{"tile": 64, "overlap": 16, **options},
    )


def batch_of(*shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    noise = 0.1 * torch.randn(shape, generator=generator)
    return {"input": target / 255 + noise, "target": target, "index": torch.arange(shape[0])}


def blurred(pictures: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(pictures, 3, 1, 1)


def test_other_metrics_are_held_against_the_input_too() -> None:
    name = "torchmetrics.image.PeakSignalNoiseRatio"
    example = tuple(torch.rand(2, 1, 3, 32, 32))
    extra = checked_metrics([name], ("image",), (), lambda _: example, {"data_range": 1.0})
    batch = batch_of(2, 3, 40, 48)
    meter = task_of(extra=extra).meter()
    meter.update(blurred, batch)
    scores = meter.result().scores

    def decibels(pictures: Tensor) -> float:
        error = (pictures.clamp(0, 1) - batch["target"] / 255).double().square().mean()
        return float(-10 * error.log10())

    before, after = decibels(batch["input"]), decibels(blurred(batch["input"]))
    assert scores["peak_signal_noise_ratio"] == pytest.approx(after, abs=1e-3)
    assert scores["peak_signal_noise_ratio_gain"] == pytest.approx(after - before, abs=1e-3)


@pytest.mark.parametrize("tile", [256, 1024])  # it was in tiles already, or whole
def test_where_memory_runs_out_tiles_are_halved(tile: int) -> None:
    batch, asked = batch_of(1, 3, 300, 330), list[int]()

    def forward(pictures: Tensor) -> Tensor:
        asked.append(max(pictures.shape[-2:]))
        if pictures[0, 0].numel() > 80 * 80:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return blurred(pictures)

    kept = []
    task = task_of(tile=tile, on_picture=lambda *found: kept.append(found))
    meter = task.meter()
    meter.update(forward, batch)
    (_, degraded, restored, *_) = kept[0]
    assert torch.equal(degraded, batch["input"][0])
    torch.testing.assert_close(restored, blurred(batch["input"])[0], atol=1e-4, rtol=0)
    assert max(asked) == min(tile, 330)
    first = len(asked)
    meter.update(forward, batch)
    assert max(asked[first:]) <= 80  # it has learnt what fits


@pytest.mark.parametrize("flip", [False, True])
def test_a_network_that_averages_sees_means_of_the_picture_also_where_tiles_are_halved(flip):
    torch.manual_seed(0)
    model = make_restorer(1, {"name": "nafnet", "base_channels": 4, "num_blocks": 1}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.04 * torch.randn_like(parameter))
    picture = torch.rand(1, 1, 40, 260) * torch.linspace(0, 1, 260)
    batch = {"input": picture, "index": torch.arange(1)}

    def forward(pictures: Tensor) -> Tensor:
        if max(pictures.shape) > 130:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return model(pictures)

    kept: list[Tensor] = []
    for network, tile in ((forward, 256), (model, 1024)):
        options = {"tile": tile, "overlap": 64, "flip": flip}
        task = task_of(on_picture=lambda _, __, restored, *___: kept.append(restored), **options)
        with torch.inference_mode():
            task.meter().update(network, batch)
    tiled, whole = kept
    assert (whole - picture[0]).abs().mean() > 0.01
    torch.testing.assert_close(tiled, whole, rtol=0, atol=4e-5)


def test_memory_that_never_suffices_is_said() -> None:
    def forward(pictures: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        task_of().meter().update(forward, batch_of(1, 3, 100, 100))


class Sizes(TorchDispatchMode):
    """Notes the bytes of the largest floats that are made on the card."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = tensors_of(result if isinstance(result, (tuple, list)) else (result,))
        sizes = [
            one.nbytes for one in made if one.device.type == "cuda" and one.is_floating_point()
        ]
        self.largest = max([self.largest, *sizes])
        return result


def test_the_card_holds_a_large_picture_as_it_was_read_and_tiles() -> None:
    batch = batch_of(1, 3, 512, 640)
    batch["input"] = (batch["input"].clamp(0, 1) * 255).byte()
    tiles = 2 * 3 * 64 * 64 * 4
    with card():
        task, on_card = task_of(DEVICE), {key: one.to(DEVICE) for key, one in batch.items()}
        with Sizes() as sizes:
            task.meter().update(blurred, on_card)
    assert 0 < sizes.largest <= tiles


def test_a_panel_shows_where_a_picture_is_most_wrong() -> None:
    target = torch.full((3, 600, 700), 0.5)
    degraded, restored = target + 0.2, target.clone()
    restored[:, 400:420, 500:520] += 0.1
    panel = panel_of(degraded, restored, target)
    assert [*panel] == ["input", "restored", "target", "error × 5"]
    assert {part.shape for part in panel.values()} == {(256, 256, 3)}
    assert {part.dtype for part in panel.values()} == {np.dtype(np.uint8)}
    assert (panel["input"] == 178).all()  # (0.5 + 0.2) × 255, rounded to even
    assert (panel["target"] == 128).all()
    wrong = panel["restored"] == 153
    assert wrong.sum() == 3 * 20 * 20
    assert (panel["error × 5"][wrong] == 128).all()
    assert (panel["error × 5"][~wrong] == 0).all()


def test_a_panel_of_a_small_grey_picture_is_twice_as_large() -> None:
    target = torch.linspace(0, 1, 40 * 50).view(1, 40, 50)
    panel = panel_of(2 * target, target - 0.5, target)
    levels = (target[0] * 255).round().byte().numpy()
    assert np.array_equal(panel["target"], np.stack([levels.repeat(2, 0).repeat(2, 1)] * 3, 2))
    assert panel["input"].max() == 255
    assert panel["restored"].min() == 0
