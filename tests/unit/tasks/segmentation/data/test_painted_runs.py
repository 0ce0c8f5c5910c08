import numpy as np
import pytest

from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.painted import table_id
from tests.contracts.source_contract import LabelledSourceContract
from tests.unit.data.files import noise, save
from tests.unit.tasks.segmentation.data.folders import folder_sources

CLASSES = Classes(("background", "large_bowel", "small_bowel", "stomach"))
HEAD = "id,class,segmentation\n"


def write(folder, rows=None, cases=6):
    """Write UW-Madison in miniature: 16-bit slices of 4 rows × 6 columns, below train/, and train.csv."""
    text = HEAD
    for case in range(cases):
        day = f"case{case}_day{case + 10}"
        name = "slice_0001_6_4_1.50_1.50.png"
        path = folder / "train" / f"case{case}" / day / "scans" / name
        save(path, noise(4, 6, seed=case, high=3000, dtype="uint16"))
        for label in CLASSES.names[1:]:
            runs = (rows or {}).get(label, "")
            text += f"{day}_slice_0001,{label},{runs}\n"
    (folder / "train.csv").write_text(text)
    return folder


def sources(folder, **options):
    return folder_sources(
        folder,
        **{
            "classes": CLASSES, "images": "train", "masks": "train.csv", "mask_format": "rle",
            "image_mode": "gray", "window": [1, 99],
            "split": {"val": 0.3, "group": r"(case\d+)_"}, **options,
        },
    )  # fmt: skip


class TestRleContract(LabelledSourceContract):
    def make_sources(self, folder):
        return sources(write(folder, {"stomach": "1 2 8 3"}))


def test_runs_start_at_1_and_go_row_by_row(tmp_path):
    found = sources(write(tmp_path, {"stomach": "2 3 24 1", "large_bowel": "6 2"}))["train"]
    _, mask = found.read(0)
    assert mask.tolist() == [
        [0, 3, 3, 3, 0, 1],
        [1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 3],
    ]


def test_later_classes_paint_over_earlier_ones(tmp_path):
    found = sources(write(tmp_path, {"stomach": "2 2", "small_bowel": "1 4"}))["train"]
    assert found.read(0)[1][0].tolist() == [2, 3, 3, 2, 0, 0]


def test_empty_segmentations_are_background(tmp_path):
    assert not sources(write(tmp_path))["val"].read(0)[1].any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a/b/plain", "plain"),
        ("case1/case1_day2/scans/slice_0003_266_276_1.50_1.50", "case1_day2_slice_0003"),
        ("flat/case1_day2_slice_0003_266_276_1.50_1.50", "case1_day2_slice_0003"),
        ("case1/case1_day2/scans/slice_0003_266_276_1.50_1.50", "slice_0003_266_276_1.50_1.50"),
    ],
)
def test_ids_come_from_the_name_or_from_uw_madisons_folders(name, expected):
    assert expected in table_id(name)


def test_a_table_of_plain_names_serves_too(tmp_path):
    for name in ("x", "y"):
        save(tmp_path / "images" / f"{name}.png", noise(2, 2))
    (tmp_path / "masks.csv").write_text(HEAD + "x,stomach,1 1\ny,stomach,2 1\n")
    found = sources(tmp_path, images="images", masks="masks.csv", split={"val": 0.5})
    masks = {s.id(0): s.read(0)[1].ravel().tolist() for s in found.values()}
    assert masks == {"x": [3, 0, 0, 0], "y": [0, 3, 0, 0]}


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("1 2 3", "not pairs of start and length: '1 2 3'"),
        ("a b", "not pairs of start and length"),
        ("23 3", r"leaves the image of 6×4 pixels"),
        ("0 1", "leaves the image"),
    ],
)
def test_bad_runs_are_reported_with_their_id(tmp_path, runs, message):
    found = sources(write(tmp_path, {"stomach": runs}))["train"]
    with pytest.raises(SegFitError, match=rf"train\.csv: id case\d_day1\d_slice_0001: .*{message}"):
        found.read(0)


@pytest.mark.parametrize(
    ("table", "messages"),
    [
        (None, ["train.csv: no such file"]),
        ("id,name\n1,2\n", ["no column class, segmentation"]),
        (
            HEAD + "case0_day10_slice_0001,stomac,1 1\n",
            ["classes stomac are none of", "'stomach'?"],
        ),
        (
            HEAD + "other,stomach,1 1\n",
            ["would have the id slice_0001", "1 of 1 ids have no image"],
        ),
    ],
)
def test_a_table_that_does_not_fit_is_reported(tmp_path, table, messages):
    write(tmp_path)
    if table is None:
        (tmp_path / "train.csv").unlink()
    else:
        (tmp_path / "train.csv").write_text(table)
    with pytest.raises(SegFitError) as error:
        sources(tmp_path)
    for message in messages:
        assert message in str(error.value)


def test_16_bit_slices_fill_the_range(tmp_path):
    image, _ = sources(write(tmp_path))["train"].read(0)
    assert image.min() == 0
    assert image.max() == 255
    assert (image == image[..., :1]).all()
    assert len(np.unique(image)) > 10
