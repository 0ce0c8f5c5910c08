import os
import unicodedata

import numpy as np
import pytest

from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from tests.contracts.source_contract import LabelledSourceContract
from tests.unit.data.files import names, noise, save, write_pairs
from tests.unit.tasks.segmentation.data.folders import folder_sources

CLASSES = Classes(("background", "cell", "wall"))


def sources(root, **options):
    return folder_sources(root, **{"classes": CLASSES, **options})


def sizes(found):
    return {split: len(source) for split, source in found.items()}


class TestFolderContract(LabelledSourceContract):
    def make_sources(self, folder):
        write_pairs(folder, [f"day {day}/ünï {i}" for day in range(2) for i in range(4)])
        return sources(folder, split={"val": 0.25, "test": 0.25})


class TestSplitFoldersContract(LabelledSourceContract):
    def make_sources(self, folder):
        for split in ("train", "val", "test"):
            write_pairs(folder / split, ["a", "b"], suffix=".JPG")
        return sources(folder)


def test_an_image_meets_the_mask_of_its_name(tmp_path):
    write_pairs(tmp_path, names(5))
    found = sources(tmp_path)["train"]
    for i in range(len(found)):
        number = int(found.id(i))
        np.testing.assert_array_equal(found.read(i)[0], noise(12, 16, 3, seed=number))
        np.testing.assert_array_equal(found.read(i)[1], noise(12, 16, seed=number, high=3))


def test_split_folders_are_kept(tmp_path):
    for split, count in {"train": 4, "val": 2, "test": 1}.items():
        write_pairs(tmp_path / split, names(count))
    assert sizes(sources(tmp_path)) == {"train": 4, "val": 2, "test": 1}


def test_split_folders_may_lie_below_images_and_masks(tmp_path):
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            save(tmp_path / kind / split / "a.png", noise(4, 4, high=3))
    found = sources(tmp_path)
    assert sizes(found) == {"train": 1, "val": 1}
    assert found["val"].id(0) == "a"


@pytest.mark.parametrize(
    ("folders", "rule", "expected"),
    [
        (["train"], {"val": 0.2}, {"train": 8, "val": 2}),
        (["train", "test"], {"val": 0.2, "test": 0.3}, {"train": 8, "val": 2, "test": 10}),
        (["train", "val"], {"val": 0.2, "test": 0.3}, {"train": 7, "val": 10, "test": 3}),
    ],
)
def test_train_gives_what_has_no_folder(tmp_path, folders, rule, expected):
    for folder in folders:
        write_pairs(tmp_path / folder, names(10))
    assert sizes(sources(tmp_path, split=rule)) == expected


def test_images_beside_their_masks(tmp_path):
    """The mask folder may lie inside the image folder."""
    for name in names(5):
        save(tmp_path / f"{name}.png", noise(4, 4, 3))
        save(tmp_path / "labels" / f"{name}.png", noise(4, 4, high=3))
    assert sizes(sources(tmp_path, images=".", masks="labels")) == {"train": 4, "val": 1}


def test_names_pair_whatever_way_their_accents_are_written(tmp_path):
    write_pairs(tmp_path, ["a", "b"])
    save(tmp_path / "images" / (unicodedata.normalize("NFD", "é") + ".png"), noise(4, 4, 3))
    save(tmp_path / "masks" / (unicodedata.normalize("NFC", "é") + ".png"), noise(4, 4, high=3))
    assert sum(sizes(sources(tmp_path)).values()) == 3


def test_names_that_are_no_unicode_pair_and_can_be_printed(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write_pairs(tmp_path, [f"sub/{name}", "b"])
    found = sources(tmp_path)
    ids = [source.id(index) for source in found.values() for index in range(len(source))]
    assert sorted(ids) == ["b", "sub/caf\\udce9"]
    assert all(source.read(0)[0].shape == (12, 16, 3) for source in found.values())


def test_hidden_files_and_other_types_are_passed_over(tmp_path):
    write_pairs(tmp_path, names(4))
    (tmp_path / "images" / "._000.png").write_bytes(b"junk")
    (tmp_path / "images" / "Thumbs.db").write_bytes(b"junk")
    found = sources(tmp_path)
    assert sum(sizes(found).values()) == 4
    assert not found["train"].listing.problems


def test_links_to_folders_are_followed(tmp_path):
    write_pairs(tmp_path / "elsewhere", names(4))
    (tmp_path / "root").mkdir()
    for kind in ("images", "masks"):
        (tmp_path / "root" / kind).symlink_to(tmp_path / "elsewhere" / kind)
    (tmp_path / "elsewhere" / "images" / "loop").symlink_to(tmp_path / "elsewhere")
    assert sum(sizes(sources(tmp_path / "root")).values()) == 4


def test_label_map_and_ignore_index_apply(tmp_path):
    for name in names(2):
        save(tmp_path / "images" / f"{name}.png", noise(1, 4, 3))
        save(tmp_path / "masks" / f"{name}.png", np.array([[0, 255, 7, 9]], np.uint8))
    found = sources(tmp_path, label_map={0: 0, 255: 1, 7: 2}, ignore_index=9)
    assert found["val"].read(0)[1].tolist() == [[0, 1, 2, IGNORE_INDEX]]


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        (noise(4, 6, 3), noise(4, 4, high=3), r"000\.png: image 6×4, mask 4×4"),
        (noise(4, 4, 3), np.full((4, 4), 9, np.uint8), r"000\.png: mask values \[9\] are no class"),
    ],
)
def test_reading_refuses_what_the_preflight_would(tmp_path, image, mask, message):
    for name in names(2):
        save(tmp_path / "images" / f"{name}.png", image)
        save(tmp_path / "masks" / f"{name}.png", mask)
    found = sources(tmp_path)
    source = next(s for s in found.values() if s.id(0) == "000")
    with pytest.raises(SegFitError, match=message):
        source.read(0)


@pytest.mark.parametrize(
    ("prepare", "options", "messages"),
    [
        (
            lambda r: None,
            {"root": "nowhere"},
            ["data.root=nowhere: there is no such folder (looked in"],
        ),
        (lambda r: None, {}, ["is empty"]),
        (
            lambda r: save(r / "pics" / "a.png", noise(2, 2)),
            {},
            ["images: no such folder (data.images)", "masks: no such folder", "holds pics"],
        ),
        (
            lambda r: write_pairs(r / "val", ["a"]),
            {},
            ["there is val, but no train folder"],
        ),
        (
            lambda r: (write_pairs(r / "train", ["a"]), save(r / "val" / "x.png", noise(2, 2))),
            {},
            ["val: no folder 'images' in it"],
        ),
        (
            lambda r: (save(r / "masks" / "a.png", noise(2, 2)), save_text(r / "images" / "a.gif")),
            {},
            ["no image in it (jpg jpeg png", "it holds files of type .gif"],
        ),
        (
            lambda r: [
                save(r / kind / f"a{end}.png", noise(2, 2))
                for kind, end in (("images", ""), ("masks", "_mask"))
            ],
            {},
            [
                "no image of",
                "The mask of a.png would be a.png",
                "1 of 1 masks have no image",
                "a_mask",
            ],
        ),
        (
            lambda r: [save(r / kind / "a.jpg", noise(2, 2)) for kind in ("images", "masks")],
            {},
            ["files of type .jpg are no masks", "JPEG changes indices"],
        ),
        (lambda r: write_pairs(r, ["a"]), {}, ["1 samples cannot be split into train and val"]),
    ],
)
def test_what_is_no_data_set_is_reported_in_full(tmp_path, prepare, options, messages):
    prepare(tmp_path)
    with pytest.raises(SegFitError) as error:
        sources(**{"root": tmp_path, **options})
    for message in messages:
        assert message in str(error.value)


def save_text(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


def test_files_without_a_partner_wait_for_the_preflight(tmp_path):
    write_pairs(tmp_path, names(9))
    for name in names(7):
        (tmp_path / "masks" / f"{name}.png").unlink()
    save(tmp_path / "masks" / "x.png", noise(2, 2))
    train = sources(tmp_path)["train"]
    (problem,) = train.listing.problems
    assert "7 of 9 images have no mask" in problem
    assert "000.png, 001.png, 002.png, 003.png, 004.png and 2 more" in problem
    (notice,) = train.listing.notices
    assert "1 of 3 masks have no image and are not used: x.png." in notice


def test_two_files_of_one_name_are_a_problem(tmp_path):
    write_pairs(tmp_path, names(3))
    save(tmp_path / "images" / "000.jpg", noise(12, 16, 3))
    (problem,) = sources(tmp_path)["train"].listing.problems
    assert "1 names stand for two files: 000.jpg and 000.png" in problem
