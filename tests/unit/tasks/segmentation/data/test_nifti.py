"""Volumes cut into slices, against what nibabel reads."""

import sys

import nibabel
import numpy as np
import pytest

from segfit.data.images import ImageReader
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.dataset import PredictDataset
from tests.unit.data.files import noise
from tests.unit.tasks.segmentation.data.folders import check_sources, folder_sources

CLASSES = Classes(("background", "liver", "spleen"))
READER = ImageReader(value_range=(-100, 155))


def write(root, suffix=".nii.gz", image="{}", count=4):
    for index in range(count):
        for kind, high, start in (("images", 256, -100), ("masks", 3, 0)):
            values = noise(10, 12, 6, seed=index, high=high).astype(np.int16) + np.int16(start)
            name = image.format(f"case{index}") if kind == "images" else f"case{index}"
            (root / kind).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / kind / f"{name}{suffix}")
    return root


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_slices_are_those_of_nibabel_and_volumes_stay_together(tmp_path, axis, suffix):
    root = write(tmp_path / "data", suffix)
    sources = folder_sources(
        root, classes=CLASSES, value_range=[-100, 155], slice_axis=axis, split={"val": 0.25}
    )
    for _ in range(2):  # the second time from the cache
        report = check_sources(sources)
        assert report.notices == []
    cases = {split: {name.split("/")[0] for name in one.names} for split, one in sources.items()}
    assert len(cases["val"]) == 1
    assert not cases["val"] & cases["train"]
    for source in sources.values():
        for index in range(len(source)):
            case, place = source.id(index).split("/")
            image, mask = source.read(index)
            for kind, found in (("images", image[..., 0]), ("masks", mask)):
                volume = nibabel.load(root / kind / f"{case}{suffix}").get_fdata()
                expected = np.take(volume, int(place[1:]), axis) + 100 * (kind == "images")
                np.testing.assert_array_equal(found, expected)
            assert all(file.is_file() for file in source.files(index))
    masks = np.concatenate([noise(10, 12, 6, seed=i, high=3).ravel() for i in range(4)])
    counted = sum(report.class_pixels.values())
    np.testing.assert_array_equal(counted, np.bincount(masks))


def test_a_volume_with_many_slices_is_named_once(tmp_path):
    sources = folder_sources(write(tmp_path / "data"), classes=CLASSES)
    (notice,) = check_sources(sources).notices
    assert notice.count("case1.nii.gz") == 1


def test_names_of_nnunet_and_prediction(tmp_path):
    root = write(tmp_path / "data", image="{}_0000")
    sources = folder_sources(
        root, classes=CLASSES, value_range=[-100, 155], image_name="{stem}_0000.nii.gz",
        mask_name="{stem}.nii.gz",
    )  # fmt: skip
    assert "case0/z0000" in [name for one in sources.values() for name in one.names]
    dataset = PredictDataset(root / "images", (16, 16), "stretch", READER)
    assert len(dataset) == 24
    assert dataset.id(0) == "case0_0000/z0000"
    assert dataset[0]["image"].shape == (3, 16, 16)


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    root = write(tmp_path / "data")
    (root / "images/case1.nii.gz").write_bytes(b"nothing")
    with pytest.raises(SegFitError, match=r"case1\.nii\.gz: unreadable"):
        folder_sources(root, classes=CLASSES)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    with pytest.raises(SegFitError, match=r"case0\.nii\.gz: needs a package.*pip install nibabel"):
        folder_sources(root, classes=CLASSES)
