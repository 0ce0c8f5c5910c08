"""The cores and the memory that this process may use, and how many workers to start on them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


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
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
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
    for path in libraries.glob("libscipy_openblas*"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(path)).scipy_openblas_set_num_threads64_(1)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes that can be allocated without swapping: the machine's, or a container's if fewer."""
    machine = int(psutil.virtual_memory().available)
    # cgroup v2, then v1
    for limit, usage, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = (cgroup / limit).read_text().strip()
            used = int((cgroup / usage).read_text())
            stat = (cgroup / limit).with_name("memory.stat").read_text().split()
        except (OSError, ValueError):
            continue
        if most.isdigit():  # not "max": no limit
            # Cached pages of files count as used, but are freed when memory is needed.
            files = int(stat[stat.index(cache) + 1]) if cache in stat else 0
            return max(0, min(machine, int(most) - used + files))
    return machine


def choose_workers(
    requested: int | None,
    *,
    device_type: str = "cuda",
    kept: bool = False,
    batch_bytes: int = 0,
    prefetch: int = 4,
    shared_memory: Path = Path("/dev/shm"),
) -> int:
    """Return how many data workers to start; 0: the main process loads the samples.

    Args:
        requested: what the config says; None: chosen by the machine.
        device_type: other than "cpu" leaves all cores but one to the workers: that one launches kernels. On "cpu"
            the model needs them too, and a low priority of workers matters: a CNN at 96 px on camvid and 2 cores
            trains 108 images/s with 2 workers and 101 without; at equal priority it is 98 with 2 and 86 with 1.
        kept: samples come from a cache and are not augmented by workers. That takes a fraction of a
            millisecond each, less than sending them between processes, so on "cpu" no worker is started.
        batch_bytes: size of a batch. Prefetched batches are in shared memory, which is small in containers
            (Docker: 64 MiB), and workers are killed when it is full.
        prefetch: batches that each worker keeps ready.
        shared_memory: where that memory is mounted on Linux.
    """
    if requested is not None:
        return requested
    cores = available_cores()
    # A spawned process takes seconds to start, and memory for another interpreter with torch.
    most = 16 if sys.platform.startswith("linux") else 4
    workers = min(most, cores if device_type == "cpu" else max(cores - 1, 1))
    if cores == 1 or (kept and device_type == "cpu"):
        workers = 0  # they would compete with the training itself
    if batch_bytes and shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        # Twice: the main process holds batches too.
        workers = min(workers, int(free // (2 * prefetch * batch_bytes)))
    return workers
