"""Wrong input on a real command line: one clear message, exit code 2, no traceback."""

import subprocess
from pathlib import Path

import pytest

from tests.integration.training import command, finished


def train(
    folder: Path, *arguments: str, options: tuple[str, ...] = ()
) -> "subprocess.CompletedProcess[str]":
    line = command(*arguments)
    return finished([line[0], *options, *line[1:]], folder)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["modle=cnn"], ["modle: there is no such key. Did you mean 'model'?"]),
        (["model=cmn"], ["model=cmn: no such choice. Did you mean 'cnn'?"]),
        (["batchsize=4"], ["Did you mean 'batch_size'?"]),
        (["weight_decay=0"], ["Did you mean 'optimizer.weight_decay'?"]),
        (
            ["imgsz=640", "optimizer.learning_rate=1"],
            ["imgsz: there is no such key. In SegFit it is image_size.", "In SegFit it is lr."],
        ),
        (["device=0"], ["must be one of auto, cpu, cuda, mps.", "CUDA_VISIBLE_DEVICES=0 python"]),
        (["device=cdua"], ["must be one of auto, cpu, cuda, mps. Did you mean 'cuda'?"]),
        (["batch_size=many"], ["batch_size=many"]),
        (["+foo=1"], ["foo: there is no such key"]),
        (["hydra.run.dir=/dev/null/x"], ["hydra.run.dir", "/dev/null/x"]),
        (["loss=[dice"], ["loss=[dice: not understood"]),
        (["resume=nowhere"], ["resume=nowhere: not a run folder"]),
        (["data=folder", "data.num_classes=2"], ["data.root has no value"]),
        (
            ["modle=cnn", "loss=dicee", "batch_size=0"],
            ["3 errors", "'model'", "'dice'", "batch_size=0: must be at least 1"],
        ),
        (["-m", "batch_size=2,x"], ["batch_size=x"]),
        (["-m", "--cfg", "job", "lr=1,2"], ["Only one of --run, --multirun, --cfg"]),
        (["-m", "hydra/launcher=joblb"], ["'joblib'? There are: basic, joblib, submitit_local"]),
    ],
)
def test_wrong_input(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    done = train(tmp_path, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr
    assert "What is missing" not in done.stdout
    assert not list(tmp_path.rglob("*.yaml"))
    assert not list(tmp_path.glob("*/*"))


def test_a_label_map_can_be_typed(tmp_path: Path) -> None:
    overrides = ("data=folder", "data.num_classes=2", "data.label_map={0: 0, 255: 1}")
    done = train(tmp_path, *overrides, "--cfg", "job")
    assert done.returncode == 0
    assert "255: 1" in done.stdout


def test_showing_the_config_does_not_import_torch(tmp_path: Path) -> None:
    done = train(tmp_path, "--cfg", "job", options=("-X", "importtime"))
    assert done.returncode == 0
    assert "batch_size: " in done.stdout
    modules = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "hydra" in modules
    assert not modules & {"torch", "timm", "transformers", "kornia"}
    assert not list(tmp_path.rglob("*.yaml"))
