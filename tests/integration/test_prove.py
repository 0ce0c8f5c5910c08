"""The scripts of docs/benchmarks: their imports; prove.py runs through at toy sizes, and goes on where it was cut off."""

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from segfit.config.check import check
from segfit.engine.precision import set_tf32
from tests.integration.training import ROOT
from tests.unit.composing import composed

PLAIN = ("data=shapes", "augmentation=none", "loader.workers=0", "accumulate=1", "data.cache=none")
SCRIPT = ROOT / "docs" / "benchmarks" / "prove.py"


def prove(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments, "--toy"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "path", sorted(SCRIPT.parent.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_what_a_script_imports_is_there(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("segfit"):
            module = importlib.import_module(node.module)
            for name in (one.name for one in node.names):
                assert hasattr(module, name) or find_spec(f"{node.module}.{name}"), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "case"),
    [
        ("exact", {"model": "cnn"}),
        ("augmentation", {}),
        ("rounding", {"model": "cnn"}),
        ("compiled", {"model": "cnn"}),
    ],
)
def test_errors_are_measured_without_tf32(stage, case, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    set_tf32(True)
    try:
        importlib.import_module("prove.stages").run("right", stage, case, True)
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
    finally:
        set_tf32(False)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["right", "memory", "speed"])
def test_a_part_runs_through(part, tmp_path):
    out = tmp_path / "prove.json"
    done = prove(part, f"--out={out}")
    found = json.loads(out.read_text())[part]
    failed = {name: one for name, one in found.items() if not one["ok"] or one["off"]}
    assert not failed, done.stderr
    assert done.returncode == 0
    last = f"{part}: {len(found)} of {len(found)} stages passed."
    assert done.stdout.splitlines()[-1] == last
    again = prove(part, f"--out={out}")
    assert again.stdout == f"{last}\n"  # nothing is left to do


# What a stage finds on a card where something is off, and what is said of it.
OFF = {
    "cards": ({"driver": [["a", 8.0]], "torch": [["a", 8.0]], "nvml": [["b", 8.0]]}, "'b', 8.0] by nvml"),
    "exact": ({"training": {"logits": 1e-6, "gradient": 0.5}}, "training: gradient off by 5.0e-01"),
    "augmentation": ({"images": 0.5, "masks": 0.0}, "images differ by 5.0e-01"),
    "rounding": ({"bf16": {"fast": 0.03, "stock": 0.01}}, "bf16 rounds worse than the stock model"),
    "repeated": ({"again": True, "resumed": False}, "trained resumed, the weights have other bits"),
    "compiled": ({"logits": 0.1, "notice": None}, "compiled logits differ by 1.0e-01"),
    "learns": ({"best": {"miou": 0.1}, "updates": 200, "precision": "fp16"}, "in fp16, 200 updates reach"),
    "predicted": ({"8": {"predicted": 2.0, "allocated": 3.0}}, "batch 8: 2.00 GiB predicted, 3.00 allocated"),
    "recipe": ({"notices": ["out of memory with a micro-batch of 8"]}, "out of memory with"),
    "runs_out": ({"ended": "KeyError: 1", "notices": [], "refused": False}, "ended by 'KeyError: 1'"),
    "largest": (
        {"max_batch": 8, "planned": 8, "samples": 64, "tried": [[8, "fits", 1.0]]},
        "but 9 was not seen to fail",
    ),
    "step": ({"32": {"ms": None, "why": "out of memory"}}, "batch 32: out of memory"),
    "busy": (
        {"names": False, "change": {"loader.workers": "4"}, "read_by": "NVML", "utilisation": 95.0},
        "not precision or model.fast",
    ),
    "processes": ({"joined": "1 joined by nccl", "difference": 0.1}, "weights differ by 1.0e-01"),
}  # fmt: skip


@pytest.mark.parametrize("stage", list(OFF))
def test_what_is_off_is_said(stage, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    verdicts, (found, said) = importlib.import_module("prove.verdicts"), OFF[stage]
    (line,) = verdicts.off(stage, found)
    assert said in line


class EnoughError(Exception):
    """The config of a stage is right."""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["right", "memory", "speed"])
def test_the_configs_for_a_card_are_right(part, monkeypatch):
    """A card costs money by the minute: no stage may fail there for what a CPU can show."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    stages = importlib.import_module("prove.stages")
    module, made = importlib.import_module(f"prove.{part}"), composed_of_plain

    def composing(*overrides, toy, base=None):
        check(made(*overrides, **({} if base is None else {"base": base})))
        raise EnoughError

    def calling(script, *overrides, toy=False, torchrun=0, base=None):
        name = "benchmark" if script == "benchmark.py" else "train"
        check(made(*overrides, name=name))
        raise EnoughError

    monkeypatch.setattr(module, "composed", composing)
    monkeypatch.setattr(module, "called", calling)
    for name, _, case in stages.of(part, toy=False):
        if name not in ("cards", "context", "kernel"):
            with pytest.raises(EnoughError):
                stages.run(part, name, case, toy=False)


def composed_of_plain(*overrides, name="train", base=PLAIN):
    lines = {text.split("=")[0]: text for text in (*base, *overrides)}
    return composed(*lines.values(), name=name)
