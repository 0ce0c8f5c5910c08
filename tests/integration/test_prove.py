"""The scripts of docs/benchmarks: their imports; prove.py runs through at toy sizes, and goes on where it was cut off."""

import ast
import importlib
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from segfit.engine.precision import set_tf32
from tests.integration.training import ROOT

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
        ("rounding", {"fast": True, "precision": "fp32"}),
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
    failed = {name: one for name, one in found.items() if not one["ok"]}
    assert not failed, done.stderr
    assert done.returncode == 0
    if part == "right":
        assert all(
            error < 1e-3
            for name, one in found.items()
            if name.startswith("exact")
            for errors in one["result"].values()
            for error in errors.values()
        )
    if part == "memory":
        answers = found["largest {}"]["result"]
        assert answers["max_batch"] == pytest.approx(answers["planned"], rel=0.1)
    again = prove(part, f"--out={out}")
    assert again.stdout == ""  # nothing is left to do
