"""How many processes and threads it pays to start on this machine, and what memory is left for them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import psutil

_CGROUP = Path("/sys/fs/cgroup")


def available_cores(cgroup: Path = _CGROUP) -> int:
    """Return the cores that this process may use: its affinity, and a container's quota, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _cgroup_quota(cgroup)
    return max(1, min(cores, int(quota + 0.5)) if quota else cores)


def _cgroup_quota(cgroup: Path) -> float | None:
    """Return a container's share of CPU time in cores (cgroup v2, then v1), or None."""
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu/cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:  # "max", or -1: no limit
        return None
    return int(quota) / int(period)


def one_blas_thread() -> None:
    """Let NumPy's own OpenBLAS use one thread, in this process and those that are forked from now on.

    Its threads spin while they wait. Beside torch's threads or another worker's they took the cores from
    whoever had work: drawing shapes for a small CNN on 2 cores, 36 images/s became 83 with a worker, and 44
    became 103 without one. Nothing happens with other BLAS libraries.
    """
    libraries = Path(np.__file__).parents[1] / "numpy.libs"
    for path in libraries.glob("libscipy_openblas*"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(str(path)).scipy_openblas_set_num_threads64_(1)


def free_memory(cgroup: Path = _CGROUP) -> int:
    """Return the bytes that may still be taken without swapping: the machine's, or a container's if fewer."""
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
            # Pages of files count as used, but are given up when somebody needs them.
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
    """Return how many processes read images; 0: the main process does it itself.

    Args:
        requested: somebody's wish, which is granted; None: by the machine.
        device_type: "cuda" leaves the cores to the workers. On "cpu" the model needs them too, and workers
            run at a low priority: a CNN at 96 px on camvid and 2 cores, 2 workers 108 images/s, none 101;
            2 of equal priority 98 (1: 86, none 87), so that is what not to do.
        kept: samples come from a cache, and no worker augments them: a fraction of a millisecond each, less
            than handing them over costs; beside a model on the CPU nobody is started for that.
        batch_bytes: size of a batch; what workers have ready lies in shared memory, which containers
            keep small (Docker: 64 MiB), and a full one kills workers.
        prefetch: batches that each worker keeps ready.
        shared_memory: where that memory is mounted on Linux.
    """
    if requested is not None:
        return requested
    cores = available_cores()
    # Starting a process by spawn costs seconds and a whole interpreter with torch in memory.
    most = 16 if sys.platform.startswith("linux") else 4
    workers = min(most, cores)
    if cores == 1 or (kept and device_type == "cpu"):
        workers = 0  # it would compete with the only process that does the work
    if batch_bytes and shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        # Twice: what the main process holds is freed only when it lets go of it.
        workers = min(workers, int(free // (2 * prefetch * batch_bytes)))
    return workers
