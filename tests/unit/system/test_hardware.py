"""The device that runs for what was asked, on machines that have others; cores, memory and workers."""

import ctypes
import os
import shutil
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from segfit.assembly.state import make_device
from segfit.errors import SegFitError
from segfit.system import hardware
from segfit.system.hardware import available_cores, choose_workers, free_memory, one_blas_thread

Usage = namedtuple("Usage", "total used free")
Memory = namedtuple("Memory", "available")
WHEELS = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]


def with_card(monkeypatch, capability, built_for):
    answers = {
        "is_available": True,
        "current_device": 0,
        "get_device_capability": capability,
        "get_device_name": "Some Card",
        "get_arch_list": built_for,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


@pytest.mark.parametrize("requested", ["cuda", "mps"])
def test_a_missing_device_is_reported(monkeypatch, requested):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, line = hardware.resolve_device(requested)
    assert device.type == "cpu"
    assert f"device={requested}: " in line
    assert "running on the CPU instead" in line
    assert hardware.resolve_device("auto") == (torch.device("cpu"), None)


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [((8, 9), WHEELS), ((7, 5), WHEELS), ((12, 1), WHEELS), ((9, 0), ["sm_90a"]), ((11, 0), ["sm_80", "compute_90"])],
)  # fmt: skip
def test_a_card_runs_code_for_its_generation(monkeypatch, capability, built_for):
    with_card(monkeypatch, capability, built_for)
    for requested in ("auto", "cuda"):
        assert hardware.resolve_device(requested) == (torch.device("cuda", 0), None)


@pytest.mark.parametrize(
    ("capability", "built_for", "build"),
    [((7, 0), WHEELS, "CUDA 12.6"), ((6, 1), WHEELS, "CUDA 12.6"), ((12, 0), ["sm_80", "sm_90"], "newer CUDA")],
)  # fmt: skip
def test_a_card_without_kernels_is_refused_with_the_build_that_has_them(
    monkeypatch, capability, built_for, build
):
    with_card(monkeypatch, capability, built_for)
    for requested in ("auto", "cuda"):
        with pytest.raises(SegFitError, match=build) as caught:
            hardware.resolve_device(requested)
        assert f"capability {capability[0]}.{capability[1]}" in str(caught.value)
    assert hardware.resolve_device("cpu") == (torch.device("cpu"), None)


def test_a_mac_trains_on_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for requested in ("auto", "mps"):
        device, line = hardware.resolve_device(requested)
        assert (device.type, line) == ("mps", None)
    assert "Apple GPU" in hardware.device_name(device)


def test_the_processor_is_named_and_measured():
    assert f"{available_cores()} cores" in hardware.device_name(torch.device("cpu"))
    assert 0 < hardware.peak_memory_gib(torch.device("cpu")) < 1024


@pytest.mark.parametrize(
    ("task", "runs"), [("segmentation", "mps"), ("restoration", "cpu"), ("forecasting", "cpu")]
)
def test_what_needs_float64_runs_beside_an_apple_gpu(monkeypatch, task, runs):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    config = OmegaConf.create({"task": {"name": task}, "precision": {"name": "bf16", "tf32": True}})
    lines: list[str] = []
    device, precision = make_device(config, "auto", lines.append)
    assert (device.type, precision.device_type) == (runs, runs)
    if runs == "mps":
        assert precision.name == "fp32"
        assert not precision.scaler(2.0**16, 2000).is_enabled()
        assert len(lines) == 1  # that it is not bf16
    else:
        assert "float64" in lines[0]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend to be a Linux machine with so many cores and so much free shared memory."""

    def pretend(count, free=1 << 34):
        monkeypatch.setattr(hardware, "available_cores", lambda: count)
        monkeypatch.setattr(hardware.sys, "platform", "linux")
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
    assert choose_workers(device_type=device_type) == expected


def test_kept_images_need_no_workers_beside_a_model_on_the_cpu(machine):
    machine(8)
    assert choose_workers(device_type="cpu", kept=True) == 0
    assert choose_workers(device_type="cuda", kept=True) == 7


def test_workers_never_fill_the_shared_memory(machine, monkeypatch, tmp_path):
    machine(8, free=64 << 20)
    monkeypatch.setattr(hardware, "_SHARED_MEMORY", tmp_path)
    assert choose_workers(batch_bytes=8 << 20) == 1
    assert choose_workers(batch_bytes=80 << 20) == 0
    assert choose_workers(batch_bytes=1 << 10) == 7


def test_starting_processes_is_dear_where_they_are_spawned(machine, monkeypatch):
    machine(8)
    monkeypatch.setattr(hardware.sys, "platform", "win32")
    assert choose_workers() == 4


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
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: Memory(1000))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert free_memory(tmp_path) == expected


def test_numpy_multiplies_with_one_thread():
    libraries = list((Path(np.__file__).parents[1] / "numpy.libs").glob("lib*openblas64*"))
    if not libraries:
        pytest.skip("this NumPy does not bring an OpenBLAS of its own")
    library = ctypes.CDLL(str(libraries[0]))
    name = "scipy_openblas" if "scipy" in libraries[0].name else "openblas"
    library[f"{name}_set_num_threads64_"](2)
    one_blas_thread()
    assert library[f"{name}_get_num_threads64_"]() == 1
