"""The graphics cards that this process may use, by the driver that torch will ask too; without importing torch.

And what trainings need of a card, from a table that benchmark=plan made: a plan itself takes too long to start with.
"""

import contextlib
import ctypes
import json
import sys
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import UUID

GIB = 2**30

# GiB of memory from which on a card gets a recipe. One that is sold as 16, 10 or 6 GB reports a little less.
_TIERS = ((14.0, "24gb"), (9.5, "12gb"), (5.5, "8gb"), (0.0, "4gb"))
# The same functions of NVIDIA's driver and of AMD's runtime.
_CUDA = ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceTotalMem_v2", "cuDeviceGetUuid_v2")
_HIP = ("hipInit", "hipGetDeviceCount", "hipDeviceGet", "hipDeviceTotalMem", "hipDeviceGetUuid")

LEAST_BATCH = 4  # of a model that is said to fit, too
# The share of the free memory that a recipe nobody chose takes at most: nothing of it was measured on this card, which may
# draw a desktop, too, and images to validate on may be larger.
MOST_OF_FREE = 0.6


@dataclass(frozen=True)
class Gpu:
    """A card, or the slice of one that MIG makes."""

    total_gib: float
    uuid: str

    def handle(self) -> Any:
        """Return NVML's handle of this card; raise an error if it has none."""
        try:
            return nvml().nvmlDeviceGetHandleByUUID(f"GPU-{self.uuid}")
        except Exception:
            return nvml().nvmlDeviceGetHandleByUUID(f"MIG-{self.uuid}")

    def free_gib(self) -> float:
        """Return the memory that other processes leave; all of it where NVML does not say."""
        with contextlib.suppress(Exception):
            return float(nvml().nvmlDeviceGetMemoryInfo(self.handle()).free / GIB)
        return self.total_gib


def visible_gpus() -> list[Gpu]:
    """Return the cards that torch will find, in its order; none without a driver.

    The driver itself obeys CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER and MIG. NVML, which obeys none of them, is only asked
    about a card that is known by its UUID.
    """
    found, rocm = list[Gpu](), "+rocm" in metadata.version("torch")
    with contextlib.suppress(OSError, AttributeError):  # no driver
        nvidia = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        # torch's ROCm build brings the runtime along.
        hip = Path(str(metadata.distribution("torch").locate_file("torch/lib/libamdhip64.so")))
        amd = str(hip) if hip.exists() else hip.name
        library = ctypes.CDLL(amd if rocm else nvidia)
        names = _HIP if rocm else _CUDA
        start, count, get, total, uuid = (getattr(library, name) for name in names)
        number, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        if start(0) != 0 or count(ctypes.byref(number)) != 0:
            return []  # it hides all cards, or there is none
        name = ctypes.create_string_buffer(16)  # of a MIG slice, not of the card that it belongs to
        for index in range(number.value):
            get(ctypes.byref(device), index)
            total(ctypes.byref(size), device)
            uuid(name, device)
            found.append(Gpu(size.value / GIB, str(UUID(bytes=name.raw))))
    return found


def tier_of(gib: float) -> str:
    """Return the tier whose recipe is for a card of so many GiB."""
    return next(name for least, name in _TIERS if gib >= least)


@cache
def nvml() -> Any:
    """Return pynvml, initialised until this process ends, or None where NVIDIA's management library is not available."""
    with contextlib.suppress(Exception):  # no driver, no library, an old one: no card can be found
        import pynvml

        pynvml.nvmlInit()
        return pynvml
    return None


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None without one."""
    with contextlib.suppress(Exception):
        return str(nvml().nvmlSystemGetDriverVersion())
    return None


@dataclass(frozen=True)
class Needs:
    """GiB that training a model takes in 16 bits, margin and context of the plan included; docs/benchmarks/cards.py."""

    fixed: float
    each: float  # of a number that the model gets
    gradients: float  # kept between micro-batches
    waiting: float  # of a number of a micro-batch that waits

    def gib(self, numbers: int, batch: int, accumulate: int = 1) -> float:
        """Return what micro-batches take whose samples have so many numbers each."""
        more, numbers = accumulate - 1, numbers * batch
        kept = self.gradients if more else 0.0
        return self.fixed + kept + numbers * (self.each + more * self.waiting)


@cache
def _table() -> Any:
    return json.loads(Path(__file__).with_name("cards.json").read_text(encoding="utf-8"))


def needs_of(task: str, model: str) -> Needs | None:
    """Return what a model needs, by its choice and its unusual options; None: it is not in the table."""
    found = _table()["models"].get(task, {}).get(model)
    return Needs(**found) if found else None


def smaller_batches(task: str, tier: str, recipe: Any, free_gib: float) -> dict[str, Any]:
    """Return what to change in a recipe that would fill a card: smaller micro-batches, with as many samples in an update."""
    model, numbers = _table()["recipes"].get(task, {}).get(tier, ("", 0))
    needs, batch, accumulate = needs_of(task, model), recipe.batch_size, recipe.get("accumulate", 1)
    room = MOST_OF_FREE * free_gib
    if needs is None or (before := needs.gib(numbers, batch, accumulate)) <= room:
        return {}
    while batch % 2 == 0 and needs.gib(numbers, batch, accumulate) > room:
        batch, accumulate = batch // 2, accumulate * 2
    usual = f"{recipe.batch_size} and {recipe.get('accumulate', 1)}"
    taken = f"{needs.gib(numbers, batch, accumulate):.1f} instead of {before:.1f} GiB"
    note = f"batch_size={batch} accumulate={accumulate} instead of {usual}: takes {taken} by plan"
    return {"batch_size": batch, "accumulate": accumulate, "hardware": {"note": note}}


def share_of_card(
    task: str, model: str, numbers: int, batch: int, accumulate: int, gib: float
) -> str:
    """Return what a training will take of a card of so many GiB, if that is known, and what would fill it."""
    needs, parts = needs_of(task, model), []
    if needs is not None:
        taken = needs.gib(numbers, batch, accumulate)
        parts.append(f"{taken:.1f} of {gib:.1f} GiB by plan, {taken / gib:.0%} of the card")
    numbers, size = _table()["filling"].get(task, (0, ""))
    fitting = []
    for name, values in _table()["models"].get(task, {}).items() if numbers else ():
        other = Needs(**values)
        most = int((gib - other.fixed) / (other.each * numbers))
        if most >= LEAST_BATCH:
            fitting.append((other.each, f"also fits: {name} at {size}, batch {most}"))
    return "; ".join([*parts, *(text for _, text in sorted(fitting)[-1:])])
