"""Splits are what people think they are, and masks may have any name."""

import numpy as np
import pytest

from segfit.data.splits import listed, split_of
from segfit.errors import SegFitError
from tests.unit.data.files import noise, save
from tests.unit.tasks.segmentation.data.folders import check_sources
from tests.unit.tasks.segmentation.data.test_folder import sources

PIXELS = {"image": noise(4, 4, 3), "mask": noise(4, 4, high=3)}
KINDS = ("images", "masks")


def fill(root, *files: str) -> None:
    """Write pictures; in a name with a "mask" in it, a mask."""
    for file in files:
        is_mask = any(word in file for word in ("mask", "annot", "label", "gtFine", "Class"))
        options = {"format": "JPEG"} if file.lower().endswith((".jpg", ".jfif")) else {}
        save(root / file, PIXELS["mask" if is_mask else "image"], **options)


def members(found):
    return {split: [source.id(i) for i in range(len(source))] for split, source in found.items()}


def notices(found):
    return " ".join(dict.fromkeys(n for s in found.values() for n in s.listing.notices))


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"),
        ("training", "validation", "testing"),
        ("train2017", "val2017", "test2017"),
        ("Train", "VAL", "Test"),
        ("training_set", "dev", "test-set"),
    ],
)
@pytest.mark.parametrize("level", ["{part}/{kind}", "{kind}/{part}"])
def test_every_usual_name_at_either_level(tmp_path, level, train, val, test):
    for part, count in ((train, 4), (val, 2), (test, 1)):
        for kind in ("images", "annotations"):
            place = level.format(part=part, kind=kind)
            fill(tmp_path, *(f"{place}/{part}{i}.png" for i in range(count)))
    found = sources(tmp_path, masks="annotations")
    assert members(found) == {
        "train": [f"{train}{i}" for i in range(4)],
        "val": [f"{val}{i}" for i in range(2)],
        "test": [f"{test}0"],
    }
    assert not notices(found)


def test_what_is_called_after_no_split():
    names = ("trainannot", "patient_1", "testimony", "valley", "training images of 2017", "")
    assert [split_of(name) for name in names] == [None] * len(names)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["val/images", "valid/images"], "valid/images are all called after val"),
        (["images/train", "images/train2017"], "train2017 are all called after train"),
        (["images/train", "train/images"], "images/train are all called after train"),
    ],
)
def test_two_folders_are_never_thrown_together(tmp_path, folders, said):
    for folder in folders:
        fill(tmp_path, f"{folder}/a.png", f"{folder.replace('images', 'masks')}/a.png")
    with pytest.raises(SegFitError, match=said):
        sources(tmp_path)


@pytest.mark.parametrize("masks", [None, "empty", "other"])
@pytest.mark.parametrize("level", ["{part}/{kind}", "{kind}/{part}"])
def test_a_test_folder_without_masks_is_for_prediction(tmp_path, level, masks):
    for part in ("train", "val", "testing"):
        fill(tmp_path, *(level.format(part=part, kind="images") + f"/{i}.png" for i in range(3)))
        if part != "testing":
            place = level.format(part=part, kind="masks")
            fill(tmp_path, *(f"{place}/{i}.png" for i in range(3)))
    place = tmp_path / level.format(part="testing", kind="masks")
    if masks:
        place.mkdir(parents=True)
    if masks == "other":
        fill(place, "x_mask.png")
    found = sources(tmp_path)
    assert sorted(found) == ["train", "val"]
    assert "no test split, for there is no mask. To predict it: evaluate.py images=" in notices(
        found
    )


def test_what_lies_beside_the_splits_is_reported(tmp_path):
    for part in ("train", "val", "extra"):
        fill(tmp_path, f"images/{part}/a.png", f"masks/{part}/a.png")
    fill(tmp_path, "images/loose.png")
    assert "extra, loose.png lie beside the splits" in notices(sources(tmp_path))
    for part in ("train", "val", "extra"):
        fill(tmp_path / "b", f"{part}/images/a.png", f"{part}/masks/a.png")
    fill(tmp_path / "b", "images/c.png")
    assert "images: c.png lie beside the splits" in notices(sources(tmp_path / "b"))
    assert "extra: called after no split" in notices(sources(tmp_path / "b"))


@pytest.mark.parametrize(
    ("train", "val", "test", "options"),
    [
        ("{}_train", "{}_val", "{}_test", {}),
        ("train_{}", "valid_{}", "test_{}", {}),
        ("{}-Train2017", "validate-{}", "{}_testing", {}),
        ("{}", "{}_holdout", "{}_test", {}),
        ("train_{}", "dev_{}", "test_{}", {"images": "train_images", "masks": "train_masks"}),
        ("{}_train", "{}_eval", "{}_test", {"images": "images_train", "masks": "masks_train"}),
    ],
)
def test_splits_may_be_named_with_the_side(tmp_path, train, val, test, options):
    for part, place, count in (("a", train, 3), ("b", val, 2), ("c", test, 1)):
        for kind in KINDS:
            fill(tmp_path, *(f"{place.format(kind)}/{part}{i}.png" for i in range(count)))
    found = sources(tmp_path, **options)
    assert members(found) == {"train": ["a0", "a1", "a2"], "val": ["b0", "b1"], "test": ["c0"]}
    assert not notices(found)


def test_options_that_folders_make_idle_give_a_notice(tmp_path):
    for part in ("train", "val"):
        fill(tmp_path, *(f"{part}/{kind}/{part}{i}.png" for kind in KINDS for i in range(4)))
    split = {"val": 0.4, "seed": 3}
    reported = notices(sources(tmp_path, split=split, slice_axis=0))
    for option in ("data.split.val=0.4", "data.split.seed=3", "data.slice_axis=0"):
        assert f"{option}: has no effect" in reported
    reported = notices(sources(tmp_path, split=split | {"test": 0.25}))
    assert "data.split.val=0.4" in reported
    assert "data.split.seed" not in reported


@pytest.mark.parametrize("places", [("",), ("train/", "valid/")])
def test_a_data_set_one_folder_below_is_named(tmp_path, places):
    fill(
        tmp_path,
        *(f"set/{place}{kind}/{i}.png" for place in places for kind in KINDS for i in range(4)),
    )
    fill(tmp_path, "other/a.png")
    with pytest.raises(
        SegFitError, match=r"no folder 'images' in it, but in set\. Say data\.root="
    ) as error:
        sources(tmp_path)
    assert error.value.problems[0].endswith(f"Say data.root={tmp_path / 'set'}.")
    assert len(error.value.problems) == 1


def test_a_split_named_with_the_side_takes_no_mask_of_another(tmp_path):
    for folder in ("images_train", "masks_train", "images_val", "images_test"):
        fill(tmp_path, *(f"{folder}/{i}.png" for i in range(3)))
    with pytest.raises(SegFitError, match="masks_val: no such folder"):
        sources(tmp_path, images="images_train", masks="masks_train")
    fill(tmp_path, *(f"masks_val/{i}.png" for i in range(3)))
    found = sources(tmp_path)
    assert sorted(found) == ["train", "val"]
    assert "no test split, for there is no mask" in notices(found)
    # One folder may hold the masks of all, but not where another is that of the images for training.
    for folder in ("images_train", "images_val", "masks"):
        fill(tmp_path / "b", *(f"{folder}/{folder[-3:]}{i}.png" for i in range(3)))
    fill(tmp_path / "b", *(f"masks/{part}{i}.png" for part in ("ain", "val") for i in range(3)))
    assert {part: len(names) for part, names in members(sources(tmp_path / "b")).items()} == {
        "train": 3,
        "val": 3,
    }
    for folder in ("images", "masks", "test_images"):
        fill(tmp_path / "c", *(f"{folder}/{i}.png" for i in range(3)))
    assert sorted(sources(tmp_path / "c")) == ["train", "val"]


def test_a_folder_of_images_that_is_called_train_is_divided(tmp_path):
    fill(
        tmp_path, *(f"train/{i}.jpg" for i in range(5)), *(f"train_masks/{i}.png" for i in range(5))
    )
    fill(tmp_path, "test/x.jpg")
    found = sources(tmp_path, images="train", masks="train_masks")
    assert sum(map(len, members(found).values())) == 5
    assert "test: no test split, for there is no mask" in notices(found)


@pytest.mark.parametrize(
    ("image", "mask", "options"),
    [
        ("images/{}.jpg", "masks/{}_mask.png", {"mask_name": "{stem}_mask.png"}),
        ("images/{}.jpg", "masks/mask_{}.TIF", {"mask_name": "mask_{stem}"}),
        ("images/{}.jpg", "masks/{}.jpg.png", {"mask_name": "{name}.png"}),
        ("imagesTr/{}_0000.png", "labelsTr/{}.png",
         {"images": "imagesTr", "masks": "labelsTr", "image_name": "{stem}_0000.png"}),
        ("leftImg8bit/x/{}_leftImg8bit.png", "gtFine/x/{}_gtFine_labelIds.png",
         {"images": "leftImg8bit", "masks": "gtFine", "image_name": "{stem}_leftImg8bit.png",
          "mask_name": "{stem}_gtFine_labelIds.png"}),
        ("{}.png", "{}_mask.png", {"images": ".", "masks": ".", "mask_name": "{stem}_mask.png"}),
        ("{}.jpg", "{}.png", {"images": ".", "masks": "."}),
        ("{}.JFIF", "{}.PNG", {"images": ".", "masks": "."}),
        ("x/{}.jpg", "x/{}.png", {"images": "x", "masks": "x"}),
        ("{}_image.tif", "{}_mask.tif",
         {"images": ".", "masks": ".", "image_name": "{stem}_image", "mask_name": "{stem}_mask"}),
    ],
)  # fmt: skip
def test_masks_are_found_by_their_names(tmp_path, image, mask, options):
    """Each mask holds one value, its image's."""
    for number in range(5):
        name = image.format(f"a.{number}")
        save(tmp_path / name, np.full((4, 4, 3), 50 * number, np.uint8),
             **{"format": "JPEG"} if name.endswith(("jpg", "JFIF")) else {})  # fmt: skip
        save(tmp_path / mask.format(f"a.{number}"), np.full((4, 4), number % 3, np.uint8))
    found = sources(tmp_path, **options)
    assert sum(map(len, found.values())) == 5
    check_sources(found)
    for source in found.values():
        for index in range(len(source)):
            number = int(source.id(index).split("a.")[1][0])
            picture, labels = source.read(index)
            assert abs(int(picture[0, 0, 0]) - 50 * number) < 3
            assert (labels == number % 3).all()


@pytest.mark.parametrize(
    ("image", "mask", "hint"),
    [
        ("images/a.jpg", "masks/a_mask.png", "data.mask_name={stem}_mask.png"),
        ("images/a.jpg", "masks/a.jpg.png", "data.mask_name={name}.png"),
        ("a.png", "a_mask.png", "no suffix distinguishes them. Say what masks are called"),
    ],
)
def test_a_name_that_would_do_is_proposed(tmp_path, image, mask, hint):
    fill(tmp_path, image, mask)
    options = {} if "/" in image else {"images": ".", "masks": "."}
    with pytest.raises(SegFitError) as caught:
        sources(tmp_path, **options)
    assert hint in str(caught.value)


def test_json_and_text_are_no_lossy_masks(tmp_path):
    fill(tmp_path, "images/a.png", "images/b.png", "images/c.png", "masks/a.png", "masks/b.png")
    (tmp_path / "masks/c.json").write_text("{}")
    (tmp_path / "images/c.xmp").write_text("")
    listing = sources(tmp_path)["train"].listing
    assert "files of type .json are no masks" in listing.problems[0]
    assert "JPEG" not in " ".join(listing.problems)
    assert "1 files are no images (.xmp) and are not read" in listing.notices[0]


def voc(root):
    fill(root, *(f"JPEGImages/2007_{i}.jpg" for i in range(8)))
    fill(root, *(f"SegmentationClass/2007_{i}.png" for i in range(6)))
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_3\n2007_1\n\n2007_0\n")
    (lists / "val.txt").write_text(
        "JPEGImages/2007_4.jpg SegmentationClass/2007_4.png\r\n2007_5 1\n"
    )
    (lists / "trainval.txt").write_text("2007_0\n2007_4\n")
    (lists / "test.txt").write_text("2007_6\n")
    return {"images": "JPEGImages", "masks": "SegmentationClass",
            "split": {"lists": "ImageSets/Segmentation"}}  # fmt: skip


def test_lists_divide_as_in_voc(tmp_path):
    options = voc(tmp_path)
    found = sources(tmp_path, **options)
    assert members(found) == {
        "train": ["2007_0", "2007_1", "2007_3"],
        "val": ["2007_4", "2007_5"],
    }
    assert "2 of 8 images are in no list and are not used: 2007_2, 2007_7" in notices(found)
    assert not found["train"].listing.problems
    seeded = sources(tmp_path, **options | {"split": options["split"] | {"seed": 3}})
    assert "data.split.seed=3: has no effect" in notices(seeded)
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("2007_0\nnowhere\n")
    with pytest.raises(SegFitError) as caught:
        sources(tmp_path, **options)
    assert "1 names are no image: nowhere" in str(caught.value)
    assert "1 names are in two splits' lists: 2007_0" in str(caught.value)


def test_lists_have_to_be_there(tmp_path):
    with pytest.raises(SegFitError, match=r"no image for train and val"):
        listed(tmp_path / "nowhere", ["a"])


@pytest.mark.parametrize("label_map", [None, {5: 0, 0: 1, 1: 2, 2: 2}])
def test_images_without_masks(tmp_path, label_map):
    fill(tmp_path, *(f"images/{i}.png" for i in range(6)), *(f"masks/{i}.png" for i in range(4)))
    options = {"label_map": label_map, "split": {"val": 0.5}}
    for kind, count in (("error", 4), ("skip", 4), ("background", 6)):
        found = sources(tmp_path, unmasked=kind, **options)
        assert sum(map(len, found.values())) == count
        assert bool(found["train"].listing.problems) == (kind == "error")
        assert ("2 of 6 images have no mask" in notices(found)) == (kind != "error")
    check_sources(found)
    blank = {
        source.id(i): source.read(i)[1] for source in found.values() for i in range(len(source))
    }
    assert all((blank[name] == 0).all() for name in "45")
