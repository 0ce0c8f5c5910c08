"""export=hf:<folder>: stock transformers reads what a run becomes."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from segfit.commands.export import publish
from segfit.errors import SegFitError
from tests.integration.training import TINY, command, compose_run, finished, train

BASE = tuple(text for text in TINY if not text.startswith("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    options = ["model=segformer_b0", "model.weights=null", "max_steps=1", "data.train_size=4"]
    names = ["data.class_names=[ground,a,b,c]", "data.mean=[0.1,0.2,0.3]"]
    return train(folder, *options, *names, base=BASE)


def test_stock_transformers_loads_the_folder_and_predicts_the_same(run, tmp_path):
    (run.run / "metrics.json").write_text(json.dumps({"best": {"miou": 0.1234}}))
    line = command(f"run={run.run}", "export=hf:saved", "temperature=2", script="evaluate.py")
    done = finished(line, tmp_path)
    assert done.returncode == 0, done.stderr
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "saved").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "saved")
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    inputs = processor(images=image, return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.1, 0.2, 0.3], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(inputs[0], (image / 255 - mean) / std, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        theirs = model(inputs).logits
        theirs = torch.nn.functional.interpolate(theirs, (64, 64), mode="bilinear")
        saved = torch.load(run.run / "checkpoints" / "best.pt", weights_only=True)["model"]
        run.model.load_state_dict(saved)
        ours = run.model.eval()(inputs)
    torch.testing.assert_close(ours, 2 * theirs, rtol=1e-3, atol=1e-4)
    assert model.config.id2label == {0: "ground", 1: "a", 2: "b", 3: "c"}
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "| miou | 0.1234 |" in card
    assert "Classes: ground, a, b, c" in card
    # a hub that nobody reaches: the folder stays
    line = command(f"run={run.run}", "export=hf:again", "push=me/mine", script="evaluate.py")
    done = finished(line, tmp_path)
    assert done.returncode == 2
    assert "push=me/mine: not uploaded" in done.stderr
    assert (tmp_path / "again" / "model.safetensors").exists()


def test_what_transformers_does_not_know_is_refused(tmp_path):
    cnn = SimpleNamespace(config=compose_run(), model=None)
    with pytest.raises(SegFitError, match="not cnn"):
        publish(cnn, tmp_path / "x", None)
    line = command("run=x", "push=me/mine", script="evaluate.py")
    done = finished(line, tmp_path)
    assert done.returncode == 2
    assert "export=hf:my_model" in done.stderr
