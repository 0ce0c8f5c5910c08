"""What this machine has: cards, processor, driver. The hardware tier is found without importing torch."""

import contextlib
import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from segfit.system.cores import available_cores

if TYPE_CHECKING:
    import torch

GIB = 2**30

# A card that is sold as 8 GB reports a little less; the 10 GB 3080 counts as 12gb.
_TIERS = ((20.0, "24gb"), (9.5, "12gb"), (6.5, "8gb"), (0.0, "4gb"))


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


def visible_handles(library: Any) -> list[Any]:
    """Return NVML's handles of the cards in CUDA_VISIBLE_DEVICES, in its order."""
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is not None and wanted.strip() in ("", "-1"):
        return []
    count = library.nvmlDeviceGetCount()
    handles = [library.nvmlDeviceGetHandleByIndex(index) for index in range(count)]
    if not wanted:
        return handles
    ids = [part.strip() for part in wanted.split(",")]
    by_index = [int(part) for part in ids if part.isdigit() and int(part) < len(handles)]
    by_uuid = [h for h in handles if str(library.nvmlDeviceGetUUID(h)) in ids]
    return [handles[index] for index in by_index] or by_uuid or handles


def visible_cards() -> list[float]:
    """Return the memory in GiB of each NVIDIA card that CUDA_VISIBLE_DEVICES allows."""
    # no library, a card that fell off the bus
    with nvml() as library, contextlib.suppress(Exception):
        handles = visible_handles(library)
        return [library.nvmlDeviceGetMemoryInfo(handle).total / GIB for handle in handles]
    return []


def detect_tier() -> str:
    """Return the hardware tier of the first visible card, or "cpu"."""
    cards = visible_cards()
    return tier_of(cards[0]) if cards else "cpu"


def tier_of(vram_gib: float) -> str:
    """Return the largest tier whose recipe fits a card of `vram_gib`."""
    return next(name for least, name in _TIERS if vram_gib >= least)


def resolve_device(requested: str) -> "tuple[torch.device, str | None]":
    """Return the device for "auto", "cpu" or "cuda", and a message if it falls back to the CPU."""
    import torch

    if requested != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device()), None
    fallback = f"device=cuda: {_why_no_cuda()}; running on the CPU instead."
    return torch.device("cpu"), fallback if requested == "cuda" else None


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch is for the CPU only"
    if visible_cards():
        return f"the driver is too old for torch {torch.__version__} (CUDA {torch.version.cuda}): update it"
    return "torch finds no CUDA card"


def device_name(device: "torch.device") -> str:
    """Return the device's name and memory, for people."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    return _cpu_label()


def _cpu_label() -> str:
    return f"CPU ({cpu_name()}), {available_cores()} cores, {psutil.virtual_memory().total / GIB:.0f} GiB"


def machine() -> dict[str, Any]:
    """Return what measurements depend on, as plain values: device, driver, versions."""
    return {
        **_torch_facts(),
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "driver": driver_version(),
    }


def _torch_facts() -> dict[str, Any]:
    if "torch" not in sys.modules and not visible_cards():  # nothing ran on a card
        return {"device": _cpu_label(), "torch": metadata.version("torch"), "cuda": None}
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": device_name(torch.device("cuda" if cuda else "cpu")),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver, or None without one."""
    with nvml() as library, contextlib.suppress(Exception):
        return str(library.nvmlSystemGetDriverVersion())
    return None


def cpu_name() -> str:
    """Return the processor's model name."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_vendor() -> str | None:
    """Return the processor's vendor string ("GenuineIntel", "AuthenticAMD"), or None."""
    known = ("GenuineIntel", "AuthenticAMD")  # Windows: "… Family 25 Model 1 …, AuthenticAMD"
    return _cpuinfo("vendor_id") or next((n for n in known if n in platform.processor()), None)


def cpu_has_bf16() -> bool:
    """Return whether the CPU has native bf16 multiplication (AMX or AVX512-BF16)."""
    flags = _cpuinfo("flags") or ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _cpuinfo(field: str) -> str | None:
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith(field):
                return line.partition(":")[2].strip()
    return None


def peak_memory_gib(device: "torch.device") -> float:
    """Return the peak of allocated CUDA memory, or of this process's resident memory, in GiB."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def keep_freed_memory() -> None:
    """Let glibc keep freed memory instead of returning it to the system after each large tensor.

    A training step on the CPU frees and allocates the same tens of megabytes again and again, and the page faults
    take longer than the arithmetic of small layers. Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    import ctypes

    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h's M_* numbers
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)
