"""What this machine has: the device that trains, and the processor."""

import contextlib
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from segfit.errors import SegFitError
from segfit.system.cards import GIB, driver_version, visible_gpus
from segfit.system.cores import available_cores

if TYPE_CHECKING:
    import torch


def resolve_device(requested: str) -> "tuple[torch.device, str | None]":
    """Return the device for "auto", "cpu", "cuda" or "mps", and a message if it falls back to the CPU.

    Raises a SegFitError if there is a CUDA card that this build of torch has no kernels for.
    """
    import torch

    if requested in ("auto", "cuda") and torch.cuda.is_available():
        _refuse_without_kernels()
        return torch.device("cuda", torch.cuda.current_device()), None
    if requested in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps"), None
    reason = _why_no_cuda() if requested == "cuda" else "torch finds no GPU of Apple's here"
    fallback = f"device={requested}: {reason}; running on the CPU instead."
    return torch.device("cpu"), fallback if requested in ("cuda", "mps") else None


def _refuse_without_kernels() -> None:
    """Raise a SegFitError if the first kernel on the present card would fail: not every build has those of every card."""
    import torch

    built_for = torch.cuda.get_arch_list()
    if torch.version.hip is not None or not built_for:
        return
    own = torch.cuda.get_device_capability()
    kinds = [re.fullmatch(r"(sm|compute)_(\d+)(\d).*", name) for name in built_for]
    known = [(kind[1], (int(kind[2]), int(kind[3]))) for kind in kinds if kind]
    # Machine code runs on later cards of its generation, PTX is compiled for any later card.
    if any(one <= own and (kind == "compute" or one[0] == own[0]) for kind, one in known):
        return
    older = all(own < one for _, one in known)
    build = "for CUDA 12.6 (…/whl/cu126)" if older else "for a newer CUDA"
    raise SegFitError(
        f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name()} (compute capability "
        f"{own[0]}.{own[1]}), only for {', '.join(built_for)}. Install a build {build}: "
        f"https://pytorch.org/get-started/locally. Another card: CUDA_VISIBLE_DEVICES=1. Without one: device=cpu."
    )


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        return "this build of torch has no CUDA"
    if visible_gpus():
        return f"the driver is too old for torch {torch.__version__} (CUDA {torch.version.cuda}): update it"
    return "torch finds no CUDA card"


def device_name(device: "torch.device") -> str:
    """Return the device's name and memory, for people."""
    import torch

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
    return f"Apple GPU ({cpu_name()})" if device.type == "mps" else _cpu_label()


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
    if "torch" not in sys.modules and not visible_gpus():  # nothing ran on a card
        return {"device": _cpu_label(), "torch": metadata.version("torch"), "cuda": None}
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    return {
        "device": device_name(torch.device("cuda" if cuda else "mps" if mps else "cpu")),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
    }


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


def fits(size: int, device: "torch.device") -> bool:
    """Say whether so many bytes take less than half of a CUDA card's free memory; of other devices always."""
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():  # planning pretends a card
        return True
    return size < torch.cuda.mem_get_info(device)[0] / 2


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
