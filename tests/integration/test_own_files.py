"""Files as people have them, through the real commands: bands of 16 bits, outlines, colours, volumes; and the page of benchmark=data."""

import json
import re

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageDraw

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


OPTIONS = {
    "coco": ["data.masks=all.json", "data.mask_format=coco", "data.class_names=[background,cell]"],
    "yolo": ["data.masks=outlines", "data.mask_format=yolo", "data.unmasked=skip", "data.split.lists=lists"],
    "labelme": ["data.masks=images", "data.mask_format=labelme", "data.class_names=[background,cell]"],
    "colors": ["data.colors=[[9,9,9],[200,0,90]]"],
    "nifti": ["data.images=volumes", "data.masks=labels", "data.value_range=[-160,260]"],
    "names": [
        *("data.images=named", "data.image_name={stem}_img.png", "data.masks=named", "data.mask_name={stem}_truth.png"),
        *("data.split.lists=lists", "data.unmasked=background"),
        *("data.fit=crop", "data.sampling=balanced", "data.crops_per_image=2", "data.foreground=0.5"),
    ],
}  # fmt: skip
HELD_OUT = ["2", "5", "7"]  # in the lists; the last one has no mask in some forms


def write_forms(root):
    """Write eight images with their masks in every form, and return what Pillow draws of them."""
    made = {"images": [], "annotations": [], "categories": [{"id": 3, "name": "cell"}]}
    drawn = {}
    for index in range(8):
        (top, left, height, width), mask = square(index)
        picture = noise(*SIZE, 3, seed=index, high=60) + 150 * mask[..., None]
        corners = [
            [left, top],
            [left + width, top],
            [left + width, top + height],
            [left, top + height],
        ]
        expected = Image.new("L", SIZE[::-1])
        ImageDraw.Draw(expected).rectangle((left, top, left + width - 1, top + height - 1), fill=1)
        drawn[str(index)] = np.asarray(expected)
        save(root / f"images/{index}.png", picture)
        save(root / f"masks/{index}.png", np.array([[9, 9, 9], [200, 0, 90]], np.uint8)[mask])
        save(root / f"named/{index}_img.png", picture)
        shape = {"label": "cell", "points": corners, "shape_type": "polygon"}
        (root / f"images/{index}.json").write_text(json.dumps({"shapes": [shape]}))
        made["images"].append({"id": index, "file_name": f"{index}.png"})
        outline = {"category_id": 3, "segmentation": [np.ravel(corners).tolist()]}
        made["annotations"].append({"image_id": index, **outline})
        if index < 7:
            save(root / f"named/{index}_truth.png", mask)
            (root / "outlines").mkdir(exist_ok=True)
            shares = " ".join(str(number / 64) for number in np.ravel(corners))
            (root / f"outlines/{index}.txt").write_text(f"0 {shares}\n")
    (root / "all.json").write_text(json.dumps(made))
    for kind, start in (("volumes", -150), ("labels", 0)):
        (root / kind).mkdir()
        for case in range(3):
            values = np.stack([square(3 * case + i)[1] for i in range(3)], 2).astype(np.int16)
            values = 400 * values + np.int16(start) if start else values
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / kind / f"{case}.nii.gz")
    (root / "lists").mkdir()
    (root / "lists/train.txt").write_text("0\n1\n3\n4\n6\n")
    (root / "lists/val.txt").write_text("\n".join(HELD_OUT))
    return drawn


@pytest.mark.parametrize("form", OPTIONS)
def test_what_is_scored_is_what_pillow_draws_whatever_form_it_has(tmp_path, form):
    """Counts and accuracies of the classes are NumPy's, of the masks that Pillow draws and those that are predicted."""
    drawn = write_forms(tmp_path / "data")
    given = [*BASE, "data.root=data", "data.num_classes=2", *OPTIONS[form]]
    given += ["epochs=30", "max_steps=30", "val_every=30", "image_size=32", "lr=0.03"]
    given += ["loss.class_weights=balanced"]  # so that each class is predicted somewhere
    code, text = train_by_command_line(tmp_path, *given, "hydra.run.dir=run")
    assert code == 0, text
    done = finished(command("run=run", "out=scored", script="evaluate.py"), tmp_path)
    assert done.returncode == 0, done.stderr
    names = list(json.loads((tmp_path / "run/samples.json").read_text())["val"])
    if form == "nifti":
        drawn = {f"{i // 3}/z{i % 3:04}": square(i)[1] for i in range(9)}
    if form == "names":
        drawn["7"] = np.zeros(SIZE, np.uint8)
    if "data.split.lists=lists" in OPTIONS[form]:
        assert names == HELD_OUT[: 3 if form == "names" else 2]
        assert ("later ones cover" in text) == (form == "yolo")
    if form == "names":
        assert " of 2 updates" in text  # five images, two crops of each, batches of four
    truth = np.stack([drawn[name] for name in names])
    found = np.stack(
        [np.asarray(Image.open(tmp_path / f"scored/masks/{name}.png")) for name in names]
    )
    rows = (tmp_path / "scored/per_class.csv").read_text().splitlines()[1:]
    for label, row in enumerate(rows):
        *_, accuracy, pixels, _ = map(float, row.split(",")[1:])
        assert pixels == (truth == label).sum()
        assert accuracy == pytest.approx((found == label)[truth == label].mean())
    assert 0.2 < found.mean() / truth.mean() < 4
