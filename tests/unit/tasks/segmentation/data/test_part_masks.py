import numpy as np
import pytest

from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import Classes
from tests.contracts.source_contract import LabelledSourceContract
from tests.unit.data.files import noise, save
from tests.unit.tasks.segmentation.data.folders import folder_sources

CLASSES = Classes(("background", "skin", "l_eye", "neck", "neck_l"))


def part(*corner, size=8):
    """Return a part file that is white from the corner down and to the right."""
    pixels = np.zeros((size, size), np.uint8)
    pixels[corner[0] :, corner[1] :] = 255
    return pixels


def write(folder, count=6):
    """Write images of 16 pixels and parts of 8, as the original writes 1024 and 512."""
    for i in range(count):
        save(folder / "CelebA-HQ-img" / f"{i}.jpg", noise(16, 16, 3, seed=i))
        masks = folder / "anno" / str(i % 2)
        save(masks / f"{i:05d}_neck_l.png", part(6, 6))
        save(masks / f"{i:05d}_skin.png", part(0, 2), "RGB")
        save(masks / f"{i:05d}_l_eye.png", part(4, 4))
    return folder


def sources(folder):
    return folder_sources(
        folder,
        classes=CLASSES,
        images="CelebA-HQ-img",
        masks="anno",
        mask_format="parts",
        split={"val": 0.3},
    )


class TestPartsContract(LabelledSourceContract):
    def make_sources(self, folder):
        return sources(write(folder))


def test_later_classes_paint_over_earlier_ones(tmp_path):
    _, mask = sources(write(tmp_path))["train"].read(0)
    assert mask[0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert mask[5].tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    assert mask[7].tolist() == [0, 0, 1, 1, 2, 2, 4, 4]


def test_images_are_brought_to_the_size_of_their_masks(tmp_path):
    image, mask = sources(write(tmp_path))["train"].read(0)
    assert image.shape == (8, 8, 3)
    assert mask.shape == (8, 8)


def test_parts_of_no_class_and_images_without_parts_are_reported(tmp_path):
    write(tmp_path)
    save(tmp_path / "anno" / "0" / "00000_hat.png", part(0, 0))
    save(tmp_path / "anno" / "0" / "00099_skin.png", part(0, 0))
    save(tmp_path / "CelebA-HQ-img" / "77.jpg", noise(16, 16, 3))
    found = sources(tmp_path)["train"]
    assert "count as background: hat (1 files)" in found.listing.notices[0]
    assert "sets of parts have no image and are not used: 99" in found.listing.notices[1]
    assert "77.jpg" in found.listing.problems[0]
    assert "77_<class name>.png" in found.listing.problems[0]


def test_parts_of_different_size_are_refused(tmp_path):
    write(tmp_path)
    for i in range(6):
        save(tmp_path / "anno" / "0" / f"{i:05d}_neck.png", part(0, 0, size=9))
    with pytest.raises(SegFitError, match=r"neck\.png: 9×9 pixels, but .*skin\.png has 8×8"):
        sources(tmp_path)["train"].read(0)
    with pytest.raises(SegFitError, match="All parts"):
        sources(tmp_path)["train"].inspect(0)
