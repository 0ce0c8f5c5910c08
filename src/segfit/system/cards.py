"""The graphics cards that this process may use, by the driver that torch will ask too; without importing torch."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import UUID

GIB = 2**30

# GiB of memory from which on a card gets a recipe. One that is sold as 16, 10 or 6 GB reports a little less.
_TIERS = ((14.0, "24gb"), (9.5, "12gb"), (5.5, "8gb"), (0.0, "4gb"))
# The same functions of NVIDIA's driver and of AMD's runtime.
_CUDA = ("cuInit", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceTotalMem_v2", "cuDeviceGetUuid")
_HIP = ("hipInit", "hipGetDeviceCount", "hipDeviceGet", "hipDeviceTotalMem", "hipDeviceGetUuid")


@dataclass(frozen=True)
class Gpu:
    """A card, or the slice of one that MIG makes."""

    total_gib: float
    uuid: str

    def handle(self, library: Any) -> Any:
        """Return NVML's handle of this card; raise one of pynvml's errors if it has none."""
        try:
            return library.nvmlDeviceGetHandleByUUID(f"GPU-{self.uuid}")
        except Exception:
            return library.nvmlDeviceGetHandleByUUID(f"MIG-{self.uuid}")

    def free_gib(self) -> float:
        """Return the memory that other processes leave; all of it where NVML does not say."""
        with nvml() as library, contextlib.suppress(Exception):
            return float(library.nvmlDeviceGetMemoryInfo(self.handle(library)).free / GIB)
        return self.total_gib


def visible_gpus() -> list[Gpu]:
    """Return the cards that torch will find, in its order; none without a driver.

    The driver itself obeys CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER and MIG. NVML, which obeys none of them, is only asked
    about a card that is known by its UUID.
    """
    rocm = "+rocm" in metadata.version("torch")
    with contextlib.suppress(OSError, AttributeError):  # no driver
        nvidia = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        library = ctypes.CDLL(_hip() if rocm else nvidia)
        names = _HIP if rocm else _CUDA
        start, count, get, total, uuid = (getattr(library, name) for name in names)
        # Since CUDA 11.4: of a MIG slice, not of the card that it belongs to.
        uuid = getattr(library, "cuDeviceGetUuid_v2", uuid)
        number, device, size = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        if (
            start(0) != 0 or count(ctypes.byref(number)) != 0
        ):  # it hides all cards, or there is none
            return []
        found, name = [], ctypes.create_string_buffer(16)
        for index in range(number.value):
            get(ctypes.byref(device), index)
            total(ctypes.byref(size), device)
            uuid(name, device)
            found.append(Gpu(size.value / GIB, str(UUID(bytes=name.raw))))
        return found
    return []


def _hip() -> str:
    """Return the runtime that torch's ROCm build brings along."""
    torch = find_spec("torch")
    own = Path(torch.origin if torch and torch.origin else "").parent / "lib" / "libamdhip64.so"
    return str(own) if own.exists() else own.name


def tier_of(gib: float) -> str:
    """Return the tier whose recipe is for a card of so many GiB."""
    return next(name for least, name in _TIERS if gib >= least)


@contextlib.contextmanager
def nvml() -> Iterator[Any]:
    """Yield the initialised pynvml module, or None where NVIDIA's management library is not available."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, an old one: no card can be found
        yield None
        return
    try:
        yield pynvml
    finally:
        with contextlib.suppress(Exception):
            pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None without one."""
    with nvml() as library, contextlib.suppress(Exception):
        return str(library.nvmlSystemGetDriverVersion())
    return None
