"""--help shows our groups, keys and help texts, at once, and leaves nothing behind."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.composing import composed
from tests.unit.test_readme import parsed, single_runs

REPOSITORY = Path(__file__).parents[2]


def shown(folder: Path, *command: str) -> tuple[str, str]:
    line = [sys.executable, "-X", "importtime", str(REPOSITORY / command[0]), *command[1:]]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "rows"),
    [
        (
            ("train.py", "--help", "hardware=8gb", "lr=0.5", "data=folder"),
            [
                "augmentation cpu kornia-gpu* none",
                "experiment b0_224 b2_256 b4_288",
                "hydra/launcher basic* joblib submitit_local submitit_slurm",
                "lr=0.5 Peak learning rate.",
                "patience=null Stop after so many validations without a new best.",
                "model: SegFormer (Xie et al., arXiv 2105.15203)",
                "model.variant=b2 Encoder size. One of: b0, b1, b2, b3, b4, b5.",
                "augmentation.scale=[0.8, 1.2] Zoom is drawn log-uniformly from this range.",
                "($XDG_CACHE_HOME/segfit)",
                "data.root=??? The folder that holds images",
            ],
        ),
        (
            ("train.py", "-h", "task=restoration", "hardware=8gb", "data=pairs"),
            [
                "data folder pairs* shapes",
                "degrade blur jpeg mixed noise*",
                "hardware 12gb 24gb 4gb 8gb* cpu auto",
                "model cnn* nafnet",
                "model.base_channels=64 Channels of the first level",
                "patch_size=128 Side of a training patch",
                "data.input=input Folder of the degraded pictures",
            ],
        ),
        (
            ("evaluate.py", "--help"),
            ["precision auto bf16 fp16 fp32", "run=??? A run folder of train.py;", "flip=false"],
        ),
        (("benchmark.py", "--help"), ["plan*", "benchmark.sizes=null Compare these sides"]),
        (("benchmark.py", "-h", "benchmark=lr_find"), ["lr_find*", "benchmark.updates=100"]),
    ],
)
def test_help(tmp_path: Path, command: tuple[str, ...], rows: list[str]) -> None:
    page, stderr = shown(tmp_path, *command)
    words = " ".join(page.split())
    for row in rows:
        assert row in words
    assert all(example in page for example in examples(command[0]))
    assert "_schema" not in page
    assert "Powered by Hydra" not in page
    assert max(map(len, page.splitlines())) <= 120
    modules = {line.rsplit("|", 1)[-1].strip() for line in stderr.splitlines()}
    assert "hydra" in modules
    assert not modules & {"torch", "timm", "transformers", "kornia"}
    assert not list(tmp_path.iterdir())


def examples(script: str) -> list[str]:
    tree = ast.parse((REPOSITORY / script).read_text(encoding="utf-8"))
    return [line for line in (ast.get_docstring(tree) or "").splitlines() if "python" in line]


@pytest.mark.parametrize("script", ["train.py", "evaluate.py", "benchmark.py"])
def test_the_examples_compose(script: str) -> None:
    assert len(examples(script)) >= 3
    for line in examples(script):
        command = parsed(line)
        assert command is not None
        name, arguments = command
        assert name == script.removesuffix(".py")
        for overrides in single_runs(arguments):
            assert composed(*overrides, name=name)
