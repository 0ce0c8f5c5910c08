import os
import time

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from segfit.data.preflight import default_cache_dir, spread
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data import preflight
from segfit.tasks.segmentation.data.folder import FolderSource
from tests.unit.data.files import names, noise, save, shapes_sources, write_pairs
from tests.unit.tasks.segmentation.data.folders import check_sources, folder_sources

CLASSES = Classes(("background", "cell", "wall"))
ORGANS = Classes(("background", "liver", "kidney", "spleen"))  # of the phantoms


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Check the folder tmp_path/data with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(
        classes=CLASSES, check="full", needs=None, progress=None, skip=False, size=(32, 32), fit="crop", **options
    ):  # fmt: skip
        sources = folder_sources(tmp_path / "data", classes=classes, **options)
        return check_sources(
            sources,
            check=check,
            needs=needs,
            progress=progress,
            skip=skip,
            size=size,
            fit=fit,
        )

    return run


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path / "data", names(10))


@pytest.fixture
def inspected(monkeypatch):
    """Return the list that names of inspected items are added to."""
    seen = []
    inspect = FolderSource.inspect

    def spy(self, index):
        seen.append(self.id(index))
        return inspect(self, index)

    monkeypatch.setattr(FolderSource, "inspect", spy)
    return seen


def problems(run, **options):
    with pytest.raises(SegFitError) as error:
        run(**options)
    return error.value.problems


def test_nothing_wrong_gives_class_pixels_and_no_notice(data, check):
    report = check()
    assert report.notices == []
    masks = [noise(12, 16, seed=i, high=3) for i in range(10)]
    expected = np.bincount(np.concatenate(masks).ravel(), minlength=3)
    np.testing.assert_array_equal(sum(report.class_pixels.values()), expected)
    assert report.class_pixels["train"].dtype == np.int64
    assert report.class_pixels["val"].sum() == 2 * 12 * 16


def test_all_problems_come_at_once(data, check):
    (data / "images" / "001.png").write_bytes(b"no picture")
    save(data / "masks" / "002.png", noise(5, 5, high=3))
    save(data / "masks" / "003.png", np.full((12, 16), 7, np.uint8))
    (data / "masks" / "004.png").unlink()
    save(data / "masks" / "005.png", noise(12, 16, 3))
    found = problems(check, needs={"train": 50, "val": 1})
    for part in (
        "train has 7 images, but needs 50",
        "1 of 10 images have no mask",
        "001.png: unreadable (not an image)",
        "002.png (image 16×12, mask 5×5 (width × height))",
        "003.png (7)",
        "005.png: a colour picture",
    ):
        assert any(part in problem for problem in found), part
    assert len(found) == 6


def test_a_problem_names_five_files_and_counts_the_rest(data, check):
    for name in names(8):
        save(data / "masks" / f"{name}.png", np.full((12, 16), 3, np.uint8))
    (problem,) = problems(check)
    assert problem.startswith(
        "8 masks with values that are no class (data.num_classes=3, so 0 to 2)"
    )
    assert problem.count(".png (3)") == 5
    assert "and 3 more" in problem


def test_many_unreadable_files_are_counted(data, check):
    for name in names(9):
        (data / "images" / f"{name}.png").write_bytes(b"")
    found = problems(check)
    assert len(found) == 6
    assert found[-1] == "… and 4 more unreadable files."


@pytest.mark.parametrize("ignore_index", [255, None])
def test_black_and_white_masks_name_the_remedy(data, check, ignore_index):
    for name in names(10):
        pixels = (noise(12, 16, high=2) * 255).astype(np.uint8)
        save(data / "masks" / f"{name}.png", pixels)
    (problem,) = problems(check, ignore_index=ignore_index)
    assert "10 masks with nothing but 0 and 255" in problem
    assert "data.label_map={0: 0, 255: 1}" in problem
    assert check(label_map={0: 0, 255: 1}).class_pixels["train"][1] > 0


def test_a_run_that_trained_is_scored_on_masks_of_background_alone(data, check):
    sources = folder_sources(data, classes=CLASSES)
    for name in sources["val"].names:
        save(data / "masks" / f"{name}.png", np.array([[0, 255]] * 12, np.uint8).repeat(8, 1))
    notices = check_sources({"val": sources["val"]}).notices
    assert "masks with nothing but 0 and 255, so no class but the first" in notices[0]
    assert "label_map" not in notices[0]


def test_classes_that_only_transparency_holds_give_a_notice(data, check):
    for name in names(2):
        pixels = np.zeros((12, 16, 4), np.uint8)
        pixels[:, :8, 3] = 255
        save(data / "masks" / f"{name}.png", pixels, "RGBA")
    (notice,) = check().notices
    assert notice.startswith("2 masks with one value alone but for their transparency")


def test_ignored_pixels_are_no_black_and_white_masks(data, check):
    save(data / "masks" / "000.png", np.array([[0, 255]] * 12, np.uint8).repeat(8, 1))
    assert check().notices == []


def test_exif_is_reported_and_explains_a_size_that_differs(data, check):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("000", "001"):
        save(data / "images" / f"{name}.png", noise(12, 16, 3), exif=exif)
    (problem,) = problems(check)
    assert "image 12×16, mask 16×12" in problem
    assert "turned by its EXIF orientation" in problem
    for name in ("000", "001"):
        save(data / "masks" / f"{name}.png", noise(16, 12, high=3))
    (notice,) = check().notices
    assert "2 images turned or mirrored by EXIF orientation" in notice


def test_empty_masks_and_absent_classes_are_notices(data, check):
    save(data / "masks" / "000.png", np.full((12, 16), 255, np.uint8))
    classes = Classes(("background", "cell", "wall", "ghost"))
    notices = check(classes=classes).notices
    assert any("1 mask with every pixel ignored" in notice for notice in notices)
    assert any(notice.startswith("No pixel of ghost in the training masks:") for notice in notices)
    assert any(notice.startswith("No pixel of ghost in the val masks:") for notice in notices)


@pytest.mark.parametrize(
    ("size", "fit", "message"),
    [
        ((64, 64), "stretch", "12 of 13 of dot. image_size=86 keeps"),
        ((64, 48), "stretch", "12 of 13 of dot. image_size=[89,67] keeps"),
        ((64, 64), "pad", "12 of 13 of dot. image_size=86 keeps"),
        ((86, 86), "stretch", ""),
        ((64, 64), "crop", ""),
    ],
)
def test_objects_below_a_pixel_are_counted_and_a_size_that_keeps_them_is_named(
    tmp_path, check, size, fit, message
):
    """The size is right: nearest neighbours in NumPy show each object at it."""
    mask = np.zeros((256, 200), np.uint8)
    for place in range(12):
        mask[10 + 20 * place : 13 + 20 * place, 7 + 15 * place : 10 + 15 * place] = 1
    mask[200:240, 20:60] = 1
    for part in ("train", "val"):
        save(tmp_path / "data" / part / "images/x.png", noise(256, 200, 3))
        save(tmp_path / "data" / part / "masks/x.png", mask * (part == "train"))
    classes = Classes(("background", "dot"), background=0)
    lines = [
        line for line in check(classes=classes, size=size, fit=fit).notices if "pixel at" in line
    ]
    assert len(lines) == bool(message)
    assert message in "".join(lines)
    rows, columns = ((np.arange(86) + 0.5) * side // 86 for side in (256, 200))
    kept = mask[np.ix_(rows.astype(int), columns.astype(int))]
    assert ndimage.label(kept)[1] == 13


def test_unchanged_files_are_not_opened_again(data, check, inspected):
    first = check()
    assert sorted(inspected) == names(10)
    inspected.clear()
    second = check()
    assert inspected == []
    np.testing.assert_array_equal(first.class_pixels["train"], second.class_pixels["train"])


@pytest.mark.parametrize("change", ["content", "time", "options", "classes"])
def test_what_changed_is_opened_again(data, check, inspected, change):
    check()
    inspected.clear()
    options = {}
    if change == "content":
        save(data / "masks" / "003.png", np.zeros((12, 16), np.uint8))
    elif change == "time":
        later = time.time() + 5
        os.utime(data / "images" / "003.png", (later, later))
    elif change == "options":
        options = {"label_map": {0: 0, 1: 1, 2: 1}}
    else:
        options = {"classes": Classes(("a", "b", "c", "d"))}
    check(**options)
    assert sorted(inspected) == (["003"] if change in ("content", "time") else names(10))


@pytest.mark.parametrize("date", [-(10**9), 2**33])
def test_files_from_before_and_after_their_time_are_remembered(data, check, inspected, date):
    for path in data.rglob("*.png"):
        os.utime(path, (date, date))
    check()
    inspected.clear()
    check()
    assert inspected == []


def test_a_second_start_opens_no_picture_of_thousands(tmp_path, check, monkeypatch):
    one = write_pairs(tmp_path / "one", ["x"], size=(2, 2))
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for name in names(3000):
            os.link(one / kind / "x.png", tmp_path / "data" / kind / f"{name}.png")
    progress = []
    check(progress=lambda done, total: progress.append((done, total)))
    assert progress == [(min(done, 3000), 3000) for done in range(256, 3256, 256)]
    opened = []

    def note(path, **_):
        opened.append(path)
        raise AssertionError(path)

    monkeypatch.setattr(Image, "open", note)
    check()
    assert opened == []


def test_what_cannot_be_read_is_a_notice_where_the_run_does_without(data, check):
    for name in ("001", "004"):
        (data / "images" / f"{name}.png").write_bytes(b"no picture")
    report = check(skip=True)
    (notice,) = report.notices
    assert notice.startswith("data.on_bad_sample=skip leaves out 2 images: ")
    assert "001.png: unreadable" in notice
    assert report.class_pixels["train"].sum() == (8 - 2) * 12 * 16
    save(data / "masks" / "002.png", noise(5, 5, high=3))
    assert ["002.png" in problem for problem in problems(check, skip=True)] == [True]


def test_a_split_without_a_picture_that_can_be_read_is_a_problem(data, check):
    for path in (data / "images").iterdir():
        path.write_bytes(b"no picture")
    found = problems(check, skip=True)
    assert found[0].startswith("train: none of the images can be read;")
    assert found[1].startswith("val: none of the images can be read;")
    assert "000.png: unreadable" in found[2]


def test_problems_are_remembered_too(data, check, inspected):
    (data / "images" / "001.png").write_bytes(b"no picture")
    first = problems(check)
    inspected.clear()
    assert problems(check) == first
    assert inspected == []


@pytest.mark.parametrize(
    "damage", [lambda _: b"junk" * 1000, lambda whole: whole[:4096] + b"\xff" * 8192]
)
def test_a_damaged_cache_is_replaced(data, check, inspected, tmp_path, damage):
    check()
    cache = tmp_path / "cache" / "segfit" / "preflight.sqlite3"
    cache.write_bytes(damage(cache.read_bytes()))
    assert check().notices == []
    assert sorted(inspected) == sorted(2 * names(10))
    assert check().notices == []
    assert len(inspected) == 20


def test_a_cache_that_cannot_be_written_is_no_error(data, check, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    assert check().class_pixels["train"].sum() > 0


def test_the_cache_lies_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "segfit"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir().parts[-2:] == (".cache", "segfit")


def test_a_sample_opens_a_hundred_of_each_split(tmp_path, check, inspected):
    one = write_pairs(tmp_path / "one", ["x"], size=(2, 2))
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for name in names(150):
            os.link(one / kind / "x.png", tmp_path / "data" / kind / f"{name}.png")
    report = check(check="sample", split={"val": 0.2})
    assert len(inspected) == 100 + 30
    assert report.class_pixels["train"].sum() == 100 * 4


def test_off_opens_nothing_but_still_counts_images(data, check, inspected):
    assert check(check="off").class_pixels == {}
    assert problems(check, check="off", needs={"test": 1}) == [
        "test has 0 images, but needs 1. Add images, change the split, or take a smaller batch_size."
    ]
    assert inspected == []


def test_progress_reaches_the_end(data, check):
    calls = []
    check(progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (10, 10)


def test_synthetic_data_is_counted_from_a_sample(tmp_path):
    sources = shapes_sources(4, 2, 1, 64, 0)
    for source in sources.values():
        source.classes = ORGANS
    report = check_sources(sources)
    assert report.notices == []
    assert report.class_pixels["train"].sum() == 4 * 64 * 64
    assert (report.class_pixels["train"] > 0).all()
    assert not any(tmp_path.glob("**/*.png"))


def test_class_pixels_of_a_sample_are_those_of_its_images(monkeypatch):
    monkeypatch.setattr(preflight, "SAMPLE", 2)
    source = shapes_sources(6, 1, 1, 64, 0)["train"]
    source.classes = ORGANS
    expected = sum(np.bincount(source.read(i)[1].ravel(), minlength=4) for i in (0, 3))
    np.testing.assert_array_equal(preflight.class_pixels(source, sample=True).sum(0), expected)


def test_a_sample_is_spread_evenly():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(10, 5) == [0, 2, 4, 6, 8]
