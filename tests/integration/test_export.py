"""evaluate.py export=…: programs that need torch or onnxruntime alone give what evaluate.py predicts."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from segfit.commands import load_run as trained
from segfit.commands.export import export_run
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from segfit.tasks.segmentation.assembly import normalisation_of
from segfit.tasks.segmentation.data.dataset import fit_image
from segfit.tasks.segmentation.schema import Evaluate
from tests.integration.training import TINY, train

READER = """
import sys, torch
extra = {"classes.json": "", "model.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
images = torch.load(sys.argv[2])
torch.save([program(image) for image in images], sys.argv[3])
assert not {"segfit", "transformers", "timm"} & set(sys.modules)
print(extra["classes.json"], extra["model.json"], sep="\\n")
"""


def load(run: Path) -> trained.TrainedRun:
    options = OmegaConf.structured(Evaluate(run=str(run)))
    return trained.load_run(options, runs.load_config(run), lambda _: None)


def predicted(run: trained.TrainedRun, image: Tensor) -> Tensor:
    """Return logits (C, H, W) of an image (3, H, W) uint8, at its own size, as evaluate.py makes them."""
    data = run.config.data
    fitted, (top, left, height, width) = fit_image(image, tuple(run.config.image_size), data.fit)
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in normalisation_of(run.config))
    with torch.inference_mode():
        logits = run.model((fitted[None].float() / 255 - mean) / std)
    content = logits[..., top : top + height, left : left + width]
    return F.interpolate(content, image.shape[-2:], mode="bilinear", align_corners=False)[0]


SIZES = [(3, 64, 96), (1, 200, 131), (2, 40, 37), (1, 1000, 300)]  # batch, height, width


@pytest.mark.parametrize(
    ("model", "fit"),
    [
        pytest.param(("model=cnn", "model.base_channels=4", "model.num_blocks=1"), "pad", id="cnn"),
        pytest.param(
            ("model=segformer_b0", "model.weights=null"),
            "stretch",
            id="segformer",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_programs_give_the_predictions_of_images_of_any_size(model, fit, tmp_path):
    base = tuple(text for text in TINY if not text.startswith("model"))
    options = (*model, f"data.fit={fit}", "image_size=[64,96]", "max_steps=2")
    train(tmp_path / "run", *options, base=base)
    run = replace(load(tmp_path / "run"), temperature=1.7)
    images = [torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8) for count, *size in SIZES]
    expected = [torch.stack([predicted(run, image) for image in batch]) / 1.7 for batch in images]
    with pytest.raises(SegFitError, match=r"model\.h5: must end with \.pt2"):
        export_run(run, tmp_path / "model.h5")

    export_run(run, tmp_path / "out" / "model.pt2")
    torch.save(images, tmp_path / "images.pt")
    paths = [tmp_path / name for name in ("out/model.pt2", "images.pt", "logits.pt")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", READER, *map(str, paths)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names, facts = map(json.loads, done.stdout.splitlines())
    assert names == facts["class_names"] == ["background", "liver", "kidney", "spleen"]
    assert (facts["fit"], facts["image_size"], facts["image_mode"]) == (fit, [64, 96], "rgb")
    for logits, right in zip(torch.load(tmp_path / "logits.pt"), expected, strict=True):
        torch.testing.assert_close(logits, right, rtol=1e-4, atol=1e-4)

    export_run(run, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["model.json"]) == facts
    for batch, right in zip(images, expected, strict=True):
        logits, classes = session.run(["logits", "classes"], {"images": batch.numpy()})
        assert np.abs(logits - right.numpy()).max() <= 1e-4
        assert (classes != right.argmax(1).numpy()).mean() <= 1e-4
