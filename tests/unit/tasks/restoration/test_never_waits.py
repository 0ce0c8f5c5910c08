"""Degradations, losses and metrics on a card without data: nothing is read from it and nothing copied to it."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segfit.engine.precision import Precision
from segfit.tasks.restoration.degradations import Degradation
from segfit.tasks.restoration.losses import RestorationLoss
from segfit.tasks.restoration.metrics import RestorationMetrics
from segfit.tuning.memory.pretend import Cuts, without_data
from segfit.tuning.memory.recorder import MemoryRecorder
from tests.unit.tasks.restoration.test_degradations import OPTIONS


class Waits(TorchDispatchMode):
    """Notes the operations that make the host wait for the card."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        packet, aten = func._overloadpacket, torch.ops.aten
        moved = packet in (aten._to_copy, aten.copy_) and result.device != args[-1].device
        if moved or packet in (aten._local_scalar_dense, aten.nonzero, aten.item):
            self.seen.append(str(func))
        return result


@pytest.mark.parametrize("kind", OPTIONS)
def test_an_update_never_waits(kind: str) -> None:
    with without_data(MemoryRecorder("cuda"), Cuts()) as device:
        degradation = Degradation(OPTIONS[kind]).to(device)
        loss = RestorationLoss(
            "psnr", Precision("fp16", "cuda"), perceptual=0.1, encoder="test_resnet", weights=None
        ).to(device)
        metrics = RestorationMetrics("y", crop_border=2).to(device)
        clean, seeds = torch.empty(2, 3, 32, 32), torch.empty(2, dtype=torch.int64)
        assert clean.device.type == "cuda"
        with Waits() as waits:
            degraded = degradation(clean, seeds)
            loss(degraded, clean, loss.totals(clean))
            metrics.update(degraded, clean, degraded)
    assert waits.seen == []


def test_waits_are_seen() -> None:
    with without_data(MemoryRecorder("cuda"), Cuts()):
        number = torch.empty(())
        with Waits() as waits:
            number.item()
            number.cpu()
    assert len(waits.seen) == 2
