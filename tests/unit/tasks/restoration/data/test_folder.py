"""Where pictures lie, which belong together, and what is wrong with them."""

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy.ndimage import gaussian_filter, uniform_filter1d

from segfit.data.shapes import shapes_sources
from segfit.errors import SegFitError
from segfit.tasks.restoration.assembly import Drawn
from segfit.tasks.restoration.data.folder import folder_sources, shift
from segfit.tasks.restoration.data.preflight import check_sources
from segfit.tasks.restoration.schema import FolderConfig, PairsConfig
from tests.contracts.source_contract import SourceContract
from tests.integration.restoring import picture, write

SMALLEST = {"train": 16, "val": 11, "test": 11}


def sources(kind, root, **options):
    return folder_sources(OmegaConf.structured(kind(root=str(root), **options)), SMALLEST)


def fill(folder, count, first=0):
    for number in range(first, first + count):
        write(folder / f"{number}.png", picture(24, 24, seed=number))


def sizes(found):
    return {split: len(source) for split, source in found.items()}


def test_a_folder_without_splits_is_divided(tmp_path):
    fill(tmp_path / "a", 6)
    fill(tmp_path / "b", 4)
    found = sources(FolderConfig, tmp_path)
    assert sizes(found) == {"train": 8, "val": 2}
    ids = [source.id(i) for source in found.values() for i in range(len(source))]
    assert sorted(ids) == sorted([f"a/{i}" for i in range(6)] + [f"b/{i}" for i in range(4)])


def test_folders_of_splits_may_have_other_names(tmp_path):
    fill(tmp_path / "train400", 10)
    fill(tmp_path / "set12", 3)
    found = sources(FolderConfig, tmp_path, train="train400", test="set12")
    assert sizes(found) == {"train": 8, "val": 2, "test": 3}


def test_a_test_set_alone(tmp_path):
    fill(tmp_path, 3)
    assert sizes(sources(FolderConfig, tmp_path, test=".")) == {"test": 3}


def test_pairs_have_equal_names(tmp_path):
    for part in ("train", "val"):
        fill(tmp_path / part / "input/x", 4)
        fill(tmp_path / part / "target/x", 4)
    found = sources(PairsConfig, tmp_path)
    assert sizes(found) == {"train": 4, "val": 4}
    target, degraded = found["train"].read(2)
    np.testing.assert_array_equal(target, degraded)
    assert [file.parts[-3] for file in found["train"].files(2)] == ["target", "input"]


@pytest.mark.parametrize(
    ("kind", "folders", "said"),
    [
        (FolderConfig, [], "no picture in it"),
        (PairsConfig, ["input"], "target: no such folder (data.target)"),
        (PairsConfig, ["input", "target"], "no picture of it has a partner"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path, kind, folders, said):
    for place, folder in enumerate(folders):
        fill(tmp_path / folder, 2, first=10 * place)
    with pytest.raises(SegFitError) as error:
        sources(kind, tmp_path)
    assert said in str(error.value)


def test_unreadable_pictures_may_be_skipped(tmp_path):
    fill(tmp_path, 6)
    (tmp_path / "x.png").write_bytes(b"nothing")
    options = {"check": "full", "needs": {"train": 1, "val": 1}}
    found = sources(FolderConfig, tmp_path)
    with pytest.raises(SegFitError, match="unreadable"):
        check_sources(found, skip=False, **options)
    (notice,) = check_sources(found, skip=True, **options).notices
    assert notice.startswith("data.on_bad_sample=skip leaves out 1:")


@pytest.mark.parametrize("moved", [(0, 0), (4, 3), (-5, 2), (11, 0)])
@pytest.mark.parametrize("degraded", ["noise", "blur", "motion", "dark"])
def test_a_shift_is_found_whatever_else_was_done(moved, degraded):
    clean = picture(200, 160, seed=4)
    other = np.roll(clean, moved, (0, 1)).astype(float)
    if degraded == "noise":
        other += np.random.default_rng(0).normal(0, 50, other.shape)
    elif degraded == "blur":
        other = gaussian_filter(other, (2, 2, 0))
    elif degraded == "motion":
        other = uniform_filter1d(other, 9, axis=1)
    else:
        other = other / 3
    found = shift(clean, other.clip(0, 255).astype(np.uint8))
    assert found == (None if moved == (0, 0) else moved)


class TestPictures(SourceContract):
    def make_sources(self, folder):
        fill(folder, 6)
        return sources(FolderConfig, folder, image_mode="gray")


class TestDrawn(SourceContract):
    def make_sources(self, folder):
        return {split: Drawn(one, 1) for split, one in shapes_sources(3, 2, 2, 32, 0).items()}

    def test_they_are_clean_pictures_alone(self, sources):
        (picture,) = sources["train"].read(0)
        assert picture.shape == (32, 32, 1)
