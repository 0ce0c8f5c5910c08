"""What this machine has for this process: the device that trains, the processor, its cores and memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from segfit.errors import SegFitError
from segfit.system.cards import GIB, driver_version, visible_gpus

if TYPE_CHECKING:
    import torch

_CGROUP, _SHARED_MEMORY = Path("/sys/fs/cgroup"), Path("/dev/shm")  # of Linux


def resolve_device(requested: str) -> tuple[torch.device, str | None]:
    """Return the device for "auto", "cpu", "cuda" or "mps", and a message if it falls back to the CPU.

    Raises a SegFitError if there is a CUDA card that this build of torch has no kernels for.
    """
    import torch

    if requested in ("auto", "cuda") and torch.cuda.is_available():
        _refuse_without_kernels()
        return torch.device("cuda", torch.cuda.current_device()), None
    if requested in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps"), None
    if requested not in ("cuda", "mps"):
        return torch.device("cpu"), None
    reason = "torch finds no CUDA card"
    if requested == "mps":
        reason = "torch finds no GPU of Apple's here"
    elif torch.version.cuda is None and torch.version.hip is None:
        reason = "this build of torch has no CUDA"
    elif visible_gpus():
        reason = f"the driver is too old for torch {torch.__version__} (CUDA {torch.version.cuda}): update it"
    return torch.device("cpu"), f"device={requested}: {reason}; running on the CPU instead."


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


def device_name(device: torch.device) -> str:
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
    name, version, toolkit = _cpu_label(), metadata.version("torch"), None
    if "torch" in sys.modules or visible_gpus():  # else nothing ran on a card
        import torch

        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = device_name(torch.device("cuda" if cuda else "mps" if mps else "cpu"))
        version, toolkit = torch.__version__, torch.version.cuda if cuda else None
    return {
        "device": name,
        "torch": version,
        "cuda": toolkit,
        "cpu": cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "driver": driver_version(),
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


def peak_memory_gib(device: torch.device) -> float:
    """Return the peak of allocated CUDA memory, or of this process's resident memory, in GiB."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / GIB
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def fits(size: int, device: torch.device) -> bool:
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
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4  # malloc.h's M_* numbers
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def core_ids() -> list[int]:
    """Return the logical cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def available_cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores this process may use, by its affinity and a container's quota; at least 1."""
    cores = len(core_ids())
    # cgroup v2, then v1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((cgroup / name).read_text() for name in names).split()
            if quota.isdigit():  # not "max" or -1: no limit
                cores = min(cores, int(int(quota) / int(period) + 0.5))
    return max(1, cores)


def one_blas_thread() -> None:
    """Let NumPy's own OpenBLAS use one thread, in this process and those that are forked from now on.

    Its threads spin while they wait, and take cores from torch's threads and from other workers. Drawing shapes
    for a small CNN on 2 cores: 83 images/s instead of 36 with a worker, 103 instead of 44 without one. Other
    BLAS libraries are left as they are.
    """
    import numpy as np  # here, since the parent process of a sweep counts cores but needs no NumPy

    libraries = Path(np.__file__).parents[1] / "numpy.libs"
    for path in libraries.glob("lib*openblas64*"):
        prefix = "scipy_" if "scipy" in path.name else ""  # NumPy 1.26's has none
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(path))[f"{prefix}openblas_set_num_threads64_"](1)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes that can be allocated without swapping: the machine's, or a container's if fewer."""
    free = int(psutil.virtual_memory().available)
    # cgroup v2, then v1
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            most, used = (int((cgroup / name).read_text()) for name in (limit, usage))
            stat = (cgroup / limit).with_name("memory.stat").read_text().split()
            # Cached pages of files count as used, but are freed when memory is needed.
            files = int(stat[stat.index(cache) + 1]) if cache in stat else 0
            free = max(0, min(free, most - used + files))
    return free


def choose_workers(
    *, device_type: str = "cuda", kept: bool = False, batch_bytes: int = 0, prefetch: int = 4
) -> int:
    """Return how many data workers suit this machine; 0: the main process loads the samples.

    Args:
        device_type: other than "cpu" leaves all cores but one to the workers: that one launches kernels. On "cpu"
            the model needs them too, and a low priority of workers matters: a CNN at 96 px on camvid and 2 cores
            trains 108 images/s with 2 workers and 101 without; at equal priority it is 98 with 2 and 86 with 1.
        kept: samples come from a cache and are not augmented by workers. That takes a fraction of a
            millisecond each, less than sending them between processes, so on "cpu" no worker is started.
        batch_bytes: size of a batch. Prefetched batches are in shared memory, which is small in containers
            (Docker: 64 MiB), and workers are killed when it is full.
        prefetch: batches that each worker keeps ready.
    """
    cores = available_cores()
    # A spawned process takes seconds to start, and memory for another interpreter with torch.
    most = 16 if sys.platform.startswith("linux") else 4
    workers = min(most, cores if device_type == "cpu" else max(cores - 1, 1))
    if cores == 1 or (kept and device_type == "cpu"):
        workers = 0  # they would compete with the training itself
    if batch_bytes and _SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(_SHARED_MEMORY).free
        # Twice: the main process holds batches too.
        workers = min(workers, int(free // (2 * prefetch * batch_bytes)))
    return workers
