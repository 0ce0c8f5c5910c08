import ctypes
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from segfit.system import cores
from segfit.system.cores import available_cores, choose_workers, free_memory, one_blas_thread

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend to be a Linux machine with so many cores and so much free shared memory."""

    def pretend(count, free=1 << 34):
        monkeypatch.setattr(cores, "available_cores", lambda: count)
        monkeypatch.setattr(cores.sys, "platform", "linux")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))

    return pretend


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "250000 100000"}, 3),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ({}, 8),
    ],
)
def test_a_containers_quota_limits_the_cores(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert available_cores(tmp_path) == expected


@pytest.mark.parametrize(
    ("count", "device_type", "expected"),
    [
        (1, "cuda", 0),
        (1, "cpu", 0),
        (2, "cpu", 2),
        (2, "cuda", 1),
        (12, "cuda", 11),
        (12, "mps", 11),
        (64, "cuda", 16),
    ],
)
def test_workers_follow_the_cores(machine, count, device_type, expected):
    machine(count)
    assert choose_workers(None, device_type=device_type) == expected


def test_kept_images_need_no_workers_beside_a_model_on_the_cpu(machine):
    machine(8)
    assert choose_workers(None, device_type="cpu", kept=True) == 0
    assert choose_workers(None, device_type="cuda", kept=True) == 7


def test_a_wish_is_granted(machine):
    machine(1)
    assert choose_workers(7) == 7
    assert choose_workers(0) == 0


def test_workers_never_fill_the_shared_memory(machine, tmp_path):
    machine(8, free=64 << 20)
    options = {"prefetch": 4, "shared_memory": tmp_path}
    assert choose_workers(None, batch_bytes=8 << 20, **options) == 1
    assert choose_workers(None, batch_bytes=80 << 20, **options) == 0
    assert choose_workers(None, batch_bytes=1 << 10, **options) == 7


def test_starting_processes_is_dear_where_they_are_spawned(machine, monkeypatch):
    machine(8)
    monkeypatch.setattr(cores.sys, "platform", "win32")
    assert choose_workers(None) == 4


Memory = namedtuple("Memory", "available")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "max", "memory.current": "5", "memory.stat": ""}, 1000),
        ({"memory.max": "900", "memory.current": "400", "memory.stat": "anon 7\nfile 9"}, 500),
        ({"memory.max": "900", "memory.current": "400", "memory.stat": "inactive_file 50"}, 550),
        ({"memory.max": "5000", "memory.current": "400", "memory.stat": ""}, 1000),
        ({"memory.max": "300", "memory.current": "400", "memory.stat": ""}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "900",
                "memory/memory.usage_in_bytes": "400",
                "memory/memory.stat": "inactive_file 3\ntotal_inactive_file 60",
            },
            560,
        ),
        ({}, 1000),
    ],
)
def test_a_containers_limit_counts_as_memory(tmp_path, monkeypatch, files, expected):
    monkeypatch.setattr(cores.psutil, "virtual_memory", lambda: Memory(1000))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert free_memory(tmp_path) == expected


def test_numpy_multiplies_with_one_thread():
    libraries = list((Path(np.__file__).parents[1] / "numpy.libs").glob("libscipy_openblas64*"))
    if not libraries:
        pytest.skip("this NumPy does not bring an OpenBLAS of its own")
    library = ctypes.CDLL(str(libraries[0]))
    library.scipy_openblas_set_num_threads64_(2)
    one_blas_thread()
    assert library.scipy_openblas_get_num_threads64_() == 1
