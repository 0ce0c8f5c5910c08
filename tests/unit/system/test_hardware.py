"""The device that runs for what was asked, on machines that have others."""

import pytest
import torch
from omegaconf import OmegaConf

from segfit.assembly.state import make_device
from segfit.errors import SegFitError
from segfit.system import hardware
from segfit.system.cores import available_cores

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
def test_a_missing_device_is_told(monkeypatch, requested):
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
