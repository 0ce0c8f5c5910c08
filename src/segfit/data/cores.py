"""How many processes it pays to start on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

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


def choose_workers(
    requested: int | None,
    *,
    device_type: str = "cuda",
    batch_bytes: int = 0,
    prefetch: int = 4,
    shared_memory: Path = Path("/dev/shm"),
) -> int:
    """Return how many processes read images; 0: the main process does it itself.

    Args:
        requested: somebody's wish, which is granted; None: by the machine.
        device_type: "cuda" leaves the cores to the workers; on "cpu" the model needs them too, and half
            of them go to workers.
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
    workers = min(most, cores if device_type == "cuda" else cores // 2)
    if cores == 1:
        workers = 0  # it would compete with the only process that does the work
    if batch_bytes and shared_memory.is_dir():
        free = shutil.disk_usage(shared_memory).free
        # Twice: what the main process holds is freed only when it lets go of it.
        workers = min(workers, int(free // (2 * prefetch * batch_bytes)))
    return workers
