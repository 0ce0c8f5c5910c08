"""Files as people have them, through the real commands: bands of 16 bits, outlines, colours, volumes; and the page of benchmark=data."""

import json
import re

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image

from tests.integration.training import TINY, command, finished, train_by_command_line
from tests.unit.data.files import noise, save

SIZE = (64, 64)
BASE = (
    *(text for text in TINY if not text.startswith("data")),
    "data=folder",
)


def square(index):
    """Return top, left, height and width of what is to be found, and its mask."""
    rng = np.random.default_rng(index)
    height, width = rng.integers(16, 40, 2).tolist()
    top, left = int(rng.integers(0, 64 - height)), int(rng.integers(0, 64 - width))
    mask = np.zeros(SIZE, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return (top, left, height, width), mask


def write_bands(root, count):
    """Write planar TIFFs of five bands of 16 bits up to 4095; what is to be found shows in the fourth alone."""
    (root / "images").mkdir(parents=True)
    for index in range(count):
        _, mask = square(index)
        bands = noise(5, *SIZE, seed=index, high=800, dtype="uint16") + np.uint16(1000)
        bands[3] += 1500 * mask.astype(np.uint16)
        tifffile.imwrite(
            root / f"images/{index:02}.tif", bands, photometric="minisblack", planarconfig="separate",
            extrasamples=[0] * 4,
        )  # fmt: skip
        save(root / f"masks/{index:02}.png", mask)
    return root


def test_five_bands_of_12_bits_from_the_page_to_predictions(tmp_path):
    root = write_bands(tmp_path / "data", 12)
    given = [*BASE, f"data.root={root}", "data.num_classes=2", "augmentation=cpu"]
    code, text = train_by_command_line(tmp_path, *given)
    assert code == 2
    assert "holds 5 bands" in text
    given += ["data.bands=[4,1,2,5]"]
    code, text = train_by_command_line(tmp_path, *given)
    assert code == 2
    found = re.search(r"data\.value_range=\[10\d\d, 3\d\d\d\]", text.replace("\n", " "))
    assert found, text
    given += ["data.value_range=[1000,3300]"]
    page = finished(
        command(*given, "benchmark=data", "benchmark.samples=3", "hydra.run.dir=page", script="benchmark.py"),
        tmp_path,
    )  # fmt: skip
    assert page.returncode == 0, page.stderr
    shown = (tmp_path / "page/data.html").read_text("utf-8")
    assert "data:image/png;base64," in shown
    code, text = train_by_command_line(
        tmp_path, *given, "epochs=12", "lr=0.01", "val_every=12", "hydra.run.dir=run"
    )
    assert code == 0, text
    done = finished(
        command("run=run", f"images={root / 'images'}", "out=predicted", script="evaluate.py"),
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    right = []
    for index in range(12):
        predicted = np.asarray(Image.open(tmp_path / f"predicted/masks/{index:02}.png"))
        right.append((predicted == square(index)[1]).mean())
    assert np.mean(right) > 0.93
    assert Image.open(tmp_path / "predicted/overlays/00.jpg").size == (64, 64)


@pytest.mark.parametrize("form", ["coco", "colors", "nifti"])
def test_outlines_colours_and_volumes_are_trained_on(tmp_path, form):
    root = tmp_path / "data"
    made = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cell"}]}
    for index in range(8):
        (top, left, height, width), mask = square(index)
        save(root / f"images/{index}.png", noise(*SIZE, 3, high=60) + 150 * mask[..., None])
        save(root / f"masks/{index}.png", np.array([[9, 9, 9], [200, 0, 90]], np.uint8)[mask])
        made["images"].append({"id": index, "file_name": f"{index}.png"})
        outline = [left, top, left + width, top, left + width, top + height, left, top + height]
        made["annotations"].append({"image_id": index, "category_id": 3, "segmentation": [outline]})
    (root / "all.json").write_text(json.dumps(made))
    for kind, start in (("volumes", -150), ("labels", 0)):
        (root / kind).mkdir()
        for case in range(3):
            values = np.stack([square(3 * case + i)[1] for i in range(3)], 2).astype(np.int16)
            values = 400 * values + np.int16(start) if start else values
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / kind / f"{case}.nii.gz")
    options = {
        "coco": ["data.masks=all.json", "data.mask_format=coco", "data.class_names=[background,cell]"],
        "colors": ["data.colors=[[9,9,9],[200,0,90]]"],
        "nifti": ["data.images=volumes", "data.masks=labels", "data.value_range=[-160,260]"],
    }  # fmt: skip
    given = [*BASE, f"data.root={root}", "data.num_classes=2", *options[form]]
    code, text = train_by_command_line(tmp_path, *given, "max_steps=2", "hydra.run.dir=run")
    assert code == 0, text
    page = finished(
        command(*given, "benchmark=data", "hydra.run.dir=page", script="benchmark.py"), tmp_path
    )
    assert page.returncode == 0, page.stderr
    told = json.loads((tmp_path / "page/results.json").read_text())["values"]["notices"]
    assert any("later ones are painted over" in line for line in told) == (form == "coco")
