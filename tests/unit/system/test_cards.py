"""Which cards a process sees, by stand-ins for NVIDIA's driver and for NVML, which disagree as the real ones do.

And what recipes take of real cards, and what else fits, by the table that benchmark=plan made.
"""

import ctypes
import os
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from omegaconf import OmegaConf

from segfit.system import cards
from segfit.system.cards import share_of_card, smaller_batches, tier_of

MIB = 2**20
HARDWARE = Path(__file__).parents[3] / "conf" / "hardware"
SMALL, LARGE, MIDDLE = "aaaa1111", "bbbb2222", "cccc3333"  # by the bus
MIG = "dddd4444"  # a slice of the large one


def uuid(start: str) -> str:
    return f"{start}-0000-0000-0000-000000000000"


class FakeDriver:
    """libcuda: the fastest card first, and CUDA_VISIBLE_DEVICES as NVIDIA documents it.

    Of a list, what comes before the first entry that names no card counts; a card is named by its number or the beginning of
    its UUID.
    """

    prefix, uuid_function = "cu", "cuDeviceGetUuid_v2"

    def __init__(self, mib: dict[str, int], slices: dict[str, int] | None = None) -> None:
        self.mib, self.slices = mib, slices or {}

    def visible(self) -> list[str]:
        wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return list(self.mib)
        found: list[str] = []
        for text in map(str.strip, wanted.split(",")):
            named = [name for name in self.mib if text and f"GPU-{uuid(name)}".startswith(text)]
            named += [name for name in self.slices if f"MIG-{uuid(name)}" == text]
            if text.isdigit() and int(text) < len(self.mib):
                named = [list(self.mib)[int(text)]]
            if len(named) != 1:
                break
            if named[0] in found:  # the same card twice: none
                return []
            found += named
        return found

    def __getattr__(self, name: str) -> Any:
        calls = {
            f"{self.prefix}Init": lambda _: 0 if self.visible() else 100,
            "cuDeviceGetCount": self.count,
            "hipGetDeviceCount": self.count,
            f"{self.prefix}DeviceGet": self.get,
            "cuDeviceTotalMem_v2": self.total,
            "hipDeviceTotalMem": self.total,
            "cuDeviceGetUuid": lambda buffer, device: self.name(buffer, ctypes.c_int(0)),  # v1
            self.uuid_function: self.name,
        }
        if name in calls and name.startswith(self.prefix):
            return calls[name]
        raise AttributeError(name)

    def count(self, number: Any) -> int:
        number._obj.value = len(self.visible())
        return 0

    def get(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def total(self, size: Any, device: Any) -> int:
        size._obj.value = (self.mib | self.slices)[self.visible()[device.value]] * MIB
        return 0

    def name(self, buffer: Any, device: Any) -> int:
        buffer.raw = UUID(uuid(self.visible()[device.value])).bytes
        return 0


class FakeNvml:
    """As much of pynvml as SegFit calls: every card by the bus, whatever CUDA may use of them."""

    def __init__(self, mib: dict[str, int], *, broken: bool = False) -> None:
        self.mib, self.broken, self.open = mib, broken, False

    def nvmlInit(self) -> None:  # noqa: N802
        if self.broken:
            raise RuntimeError("Driver Not Loaded")
        self.open = True

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        for start in self.mib:
            if name in (f"GPU-{uuid(start)}", f"MIG-{uuid(start)}"):
                return start
        raise RuntimeError("Not Found")

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(total=self.mib[handle] * MIB, free=(self.mib[handle] - 100) * MIB)


def plug_in(monkeypatch: pytest.MonkeyPatch, driver: Any, library: Any) -> None:
    """Let this process find a driver (None: there is none) and NVML."""

    def load(name: str) -> Any:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    monkeypatch.setattr(cards, "ctypes", SimpleNamespace(**{**vars(ctypes), "CDLL": load}))
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    mib = {LARGE: 24564, MIDDLE: 12288, SMALL: 4096}
    driver = FakeDriver(mib, {MIG: 9856})
    plug_in(monkeypatch, driver, FakeNvml({SMALL: 4096, LARGE: 24564, MIDDLE: 12288, MIG: 9856}))


@pytest.mark.parametrize(
    ("visible", "seen", "tier"),
    [
        (None, [LARGE, MIDDLE, SMALL], "24gb"),  # the fastest first, not by the bus
        ("", [], None),
        ("-1", [], None),
        ("NoDevFiles", [], None),
        ("99", [], None),
        (" 1 ", [MIDDLE], "12gb"),
        ("2,0", [SMALL, LARGE], "4gb"),
        ("0,99,1", [LARGE], "24gb"),
        ("GPU-cccc", [MIDDLE], "12gb"),
        (f"GPU-{uuid(SMALL)},GPU-{uuid(LARGE)}", [SMALL, LARGE], "4gb"),
        (f"MIG-{uuid(MIG)}", [MIG], "12gb"),
        ("1,GPU-aaaa1111", [MIDDLE, SMALL], "12gb"),
    ],
)
def test_cards_are_those_that_cuda_shows(machine, monkeypatch, visible, seen, tier):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    found = cards.visible_gpus()
    assert [card.uuid for card in found] == list(map(uuid, seen))
    assert [cards.tier_of(card.total_gib) for card in found[:1]] == ([] if tier is None else [tier])
    # the same cards by their UUIDs, whatever NVML's order
    assert [cards.nvml().nvmlDeviceGetName(card.handle()) for card in found] == seen
    for card in found:
        assert card.free_gib() == pytest.approx(card.total_gib - 100 / 1024)


@pytest.mark.parametrize(
    ("mib", "tier"),
    [(4096, "4gb"), (6144, "8gb"), (7799, "8gb"), (10240, "12gb"), (11264, "12gb"), (12288, "12gb"),
     (9856, "12gb"), (16380, "24gb"), (15360, "24gb"), (20475, "24gb"), (23034, "24gb"),
     (24564, "24gb"), (81559, "24gb"), (97887, "24gb"), (2048, "4gb"), (5900, "8gb"), (15109, "24gb")],
)  # fmt: skip
def test_a_card_gets_the_recipe_of_its_size(mib, tier):
    assert cards.tier_of(mib / 1024) == tier


@pytest.mark.parametrize("library", [None, FakeNvml({}), FakeNvml({}, broken=True)])
def test_without_nvml_the_driver_suffices(monkeypatch, library):
    """GB10 and others, of whose memory NVML says nothing."""
    plug_in(monkeypatch, FakeDriver({LARGE: 122502}), library)
    (card,) = cards.visible_gpus()
    assert cards.tier_of(card.total_gib) == "24gb"
    assert card.free_gib() == card.total_gib == pytest.approx(122502 / 1024)


def test_rocm_counts_as_cuda(monkeypatch):
    class Hip(FakeDriver):
        prefix, uuid_function = "hip", "hipDeviceGetUuid"

    plug_in(monkeypatch, Hip({LARGE: 24560}), None)
    assert cards.visible_gpus() == []  # this torch is not for it
    monkeypatch.setattr(metadata, "version", lambda _: "2.14.1+rocm7.1")
    assert [card.total_gib for card in cards.visible_gpus()] == [24560 / 1024]


def test_without_a_driver_it_is_the_cpu(monkeypatch):
    plug_in(monkeypatch, None, FakeNvml({LARGE: 24564}))
    assert cards.visible_gpus() == []


@pytest.mark.parametrize(
    ("card", "total", "free", "tier", "batch"),
    [
        ("1650", 4096, 3900, "4gb", 2),
        ("2060, 1660 Ti", 6144, 5900, "8gb", 4),
        ("3050", 8192, 7799, "8gb", 4),
        ("3080", 10240, 9900, "12gb", 8),
        ("2080 Ti", 11264, 10900, "12gb", 8),
        ("3060", 12288, 12000, "12gb", 8),
        ("MIG 1g.10gb", 9856, 9800, "12gb", 8),
        ("T4", 15360, 15000, "24gb", 16),
        ("4080", 16380, 16000, "24gb", 16),
        ("A4500", 20475, 20100, "24gb", 16),
        ("L4, A10", 23034, 22600, "24gb", 32),
        ("4090, 3090", 24564, 24100, "24gb", 32),
        ("H100", 81559, 81000, "24gb", 32),
        ("3060 beside another training", 12288, 4300, "12gb", 2),
        ("4090 that is nearly full", 24564, 1500, "24gb", 1),
    ],
)
def test_a_recipe_leaves_room_on_every_card(card, total, free, tier, batch):
    assert tier_of(total / 1024) == tier
    recipe = OmegaConf.load(HARDWARE / f"{tier}.yaml")
    new = OmegaConf.merge(recipe, smaller_batches("segmentation", tier, recipe, free / 1024))
    assert new.batch_size == batch
    samples = recipe.batch_size * recipe.get("accumulate", 1)
    assert new.batch_size * new.get("accumulate", 1) == samples
    assert ("note" in new.hardware) == (batch != recipe.batch_size)


def test_tasks_without_a_table_keep_their_recipes():
    recipe = OmegaConf.create({"batch_size": 64})
    assert smaller_batches("signal", "4gb", recipe, 0.1) == {}


def test_the_share_of_the_card_is_reported_and_what_would_fill_it():
    line = share_of_card("segmentation", "segformer_b2", 3 * 256**2, 4, 1, 8.0)
    share, also = line.split("; ")
    assert share.endswith("of 8.0 GiB by plan, 19% of the card")
    assert also.startswith("also fits: segformer_b5 at 512 px, batch ")
    # of a model that is not in the table only what else fits is known
    assert share_of_card("segmentation", "vit", 1, 1, 1, 8.0) == also
    assert share_of_card("segmentation", "vit", 1, 1, 1, 1.0) == ""
    assert share_of_card("signal", "tiny", 1, 1, 1, 8.0) == ""
