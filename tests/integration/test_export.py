"""evaluate.py export=…: a program that needs torch alone gives the logits of the run's model."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from segfit.commands import load_run as trained
from segfit.commands.export import export_run
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.tasks.segmentation.export import Deployed
from segfit.tasks.segmentation.schema import Evaluate
from tests.integration.training import TINY, train

READER = """
import sys, torch
extra = {"classes.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.load(sys.argv[2])
torch.save([program(images), program(images[:1])], sys.argv[3])
assert not {"segfit", "transformers", "timm"} & set(sys.modules)
print(extra["classes.json"])
"""


def load(run: Path) -> trained.TrainedRun:
    options = OmegaConf.structured(Evaluate(run=str(run)))
    return trained.load_run(options, runs.load_config(run), lambda _: None)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(("model=cnn", "model.base_channels=8"), id="cnn"),
        pytest.param(
            ("model=segformer_b0", "model.weights=null"), id="segformer", marks=pytest.mark.slow
        ),
    ],
)
def test_the_program_gives_the_models_logits(model, tmp_path):
    base = tuple(text for text in TINY if not text.startswith("model"))
    train(tmp_path / "run", *model, "max_steps=2", "image_size=[64,96]", base=base)
    run = load(tmp_path / "run")
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8)
    mean, std = list(run.config.data.mean), list(run.config.data.std)
    with torch.inference_mode():
        expected = Deployed(run.model, mean, std)(images)

    export_run(run, tmp_path / "out" / "model.pt2")
    torch.save(images, tmp_path / "images.pt")
    paths = [tmp_path / name for name in ("out/model.pt2", "images.pt", "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == '["background", "liver", "kidney", "spleen"]'
    logits, one = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-4)


def test_another_ending_is_refused(tmp_path):
    train(tmp_path / "run", "max_steps=1")
    with pytest.raises(SegFitError, match=r"model\.onnx: must end with \.pt2"):
        export_run(load(tmp_path / "run"), tmp_path / "model.onnx")
