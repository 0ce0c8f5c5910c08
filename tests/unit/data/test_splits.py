import random

import pytest

from segfit.config.schema import SplitConfig
from segfit.data.splits import listed, split_names
from segfit.errors import SegFitError
from tests.unit.data.files import names

NAMES = names(30)


def test_shares_cover_everything_once():
    split = split_names(NAMES, SplitConfig(val=0.2, test=0.1))
    assert {part: len(members) for part, members in split.items()} == {
        "train": 21,
        "val": 6,
        "test": 3,
    }
    assert sorted(name for members in split.values() for name in members) == NAMES


def test_the_order_of_the_files_does_not_matter():
    shuffled = random.Random(0).sample(NAMES, len(NAMES))
    assert split_names(shuffled, SplitConfig()) == split_names(NAMES, SplitConfig())


def test_another_seed_is_another_split():
    first, second = (split_names(NAMES, SplitConfig(seed=seed))["val"] for seed in (0, 1))
    assert first != second


def test_new_images_leave_the_others_where_they_were():
    before = set(split_names(NAMES, SplitConfig())["val"])
    after = set(split_names([*NAMES, "new"], SplitConfig())["val"])
    assert len(before - after) <= 1


@pytest.mark.parametrize("expression", [r"^(p\d+)_", r"^p\d+"])
def test_patients_stay_together(expression):
    slices = [f"p{patient}_{number}" for patient in range(10) for number in range(patient + 1)]
    split = split_names(slices, SplitConfig(val=0.3, group=expression))
    patients = [{name.split("_")[0] for name in members} for members in split.values()]
    assert len(patients[1]) == 3
    assert not patients[0] & patients[1]


def test_no_test_share_means_no_test_split():
    assert set(split_names(NAMES, SplitConfig())) == {"train", "val"}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SplitConfig(group="x"), r"matches nothing in 30 of 30 names, e\.g\. 000, 001, 002\."),
        (SplitConfig(group="^0"), "1 groups .* cannot be split"),
        (SplitConfig(val=0.0, fold=1), "a val folder says already"),
        (SplitConfig(fold=0, folds=31), "more than the 30 samples or groups there are"),
        (SplitConfig(val=0.6, test=0.5), "30 samples cannot be split into train and val and test"),
    ],
)
def test_what_cannot_be_split_is_reported(rule, message):
    with pytest.raises(SegFitError, match=message):
        split_names(NAMES, rule)


@pytest.mark.parametrize(("test", "group"), [(0.0, None), (0.2, None), (0.2, r"^(\d+)")])
def test_folds_hold_every_image_out_once_and_never_one_of_test(test, group):
    slices = [f"{name}{letter}" for name in names(30) for letter in "ab"]
    plain = split_names(slices, SplitConfig(test=test, group=group))
    found = [
        split_names(slices, SplitConfig(test=test, group=group, fold=fold, folds=4))
        for fold in range(4)
    ]
    held_out = [name for split in found for name in split["val"]]
    assert sorted(held_out) == sorted({*slices} - {*plain.get("test", [])})
    for split in found:
        assert split.get("test") == plain.get("test")
        assert sorted(name for members in split.values() for name in members) == sorted(slices)
        if group:
            assert not {name[:3] for name in split["val"]} & {name[:3] for name in split["train"]}


def test_the_first_of_five_folds_is_the_usual_split():
    assert split_names(NAMES, SplitConfig(fold=0)) == split_names(NAMES, SplitConfig(val=0.2))


def by_lists(folder, train, val):
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_text("\n".join(train))
    (folder / "val.txt").write_text("\n".join(val))
    return listed(folder, ["case1/000", "case1/001", "case2/000", "case2/002"])


@pytest.mark.parametrize(
    "line",
    [
        "case1/000",
        "case1/000.png",
        "images/case1/000.png",
        "/mnt/data/images/case1/000.png",
        "images/case1/000.png masks/case1/001.png",
        "my images/case1/000.png",
        "case1/000 1 -1",
    ],
)
def test_a_list_says_which_of_equal_names_it_means(tmp_path, line):
    found = by_lists(tmp_path / "lists", [line, "001"], [line.replace("case1", "case2"), "002.png"])
    assert found == {"train": ["case1/000", "case1/001"], "val": ["case2/000", "case2/002"]}


def test_a_name_in_a_list_that_several_images_have_is_named_with_them(tmp_path):
    with pytest.raises(
        SegFitError, match=r"train\.txt: 1 names .*: 000\.png \(case1/000, case2/000\)\. Write"
    ):
        by_lists(tmp_path / "lists", ["000.png", "case1/001"], ["002"])
