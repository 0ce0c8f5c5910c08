"""The tier of a machine, told by a stand-in for NVIDIA's library."""

import sys
from types import SimpleNamespace

import pytest

from segfit.system import hardware
from segfit.system.cores import available_cores


class FakeNvml:
    """As much of pynvml as SegFit calls."""

    def __init__(self, *gib: float, broken: bool = False) -> None:
        self.gib, self.broken, self.open = gib, broken, False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise RuntimeError("Driver Not Loaded")
        self.open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open = False

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.gib)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=self.gib[handle] * hardware.GIB)


@pytest.fixture
def three_cards(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    library = FakeNvml(3.9, 7.8, 23.6)
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return library


@pytest.mark.parametrize(
    ("gib", "tier"),
    [(2.0, "4gb"), (3.9, "4gb"), (5.8, "4gb"), (7.7, "8gb"), (9.8, "12gb"), (11.6, "12gb"),
     (15.7, "12gb"), (23.5, "24gb"), (79.0, "24gb")],
)  # fmt: skip
def test_a_card_gets_the_largest_recipe_that_fits(gib: float, tier: str) -> None:
    assert hardware.tier_of(gib) == tier


@pytest.mark.parametrize(
    ("visible", "tier"),
    [(None, "4gb"), ("0", "4gb"), ("2,0", "24gb"), (" 1 ", "8gb"), ("GPU-2", "24gb"), ("", "cpu"),
     ("-1", "cpu")],
)  # fmt: skip
def test_the_first_visible_card_decides(
    three_cards: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, tier: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert hardware.detect_tier() == tier
    assert not three_cards.open


@pytest.mark.parametrize("library", [FakeNvml(), FakeNvml(8.0, broken=True), None])
def test_without_a_card_it_is_the_cpu(
    monkeypatch: pytest.MonkeyPatch, library: FakeNvml | None
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", library)  # None: the import fails
    assert hardware.detect_tier() == "cpu"


def test_a_missing_device_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, line = hardware.resolve_device("cuda")
    assert device.type == "cpu"
    assert line is not None
    assert "running on the CPU instead" in line
    assert hardware.resolve_device("auto") == (torch.device("cpu"), None)


def test_the_processor_is_named_and_measured() -> None:
    import torch

    assert f"{available_cores()} cores" in hardware.device_name(torch.device("cpu"))
    assert 0 < hardware.peak_memory_gib(torch.device("cpu")) < 1024
