"""What the pre-flight passes can be read, what it refuses is named, and nothing ends in a traceback."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segfit.data.source import Source
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.data.dataset import EvalDataset, TrainDataset
from tests.fuzz import files
from tests.fuzz.profiles import examples
from tests.unit.data.files import noise, save, write_pairs
from tests.unit.tasks.segmentation.data.folders import check_sources, folder_sources

CLASSES = Classes(("background", "cell", "wall"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data set with a sound val/ and nothing in train/."""
    root = tmp_path_factory.mktemp("data")
    write_pairs(root / "val", ["fine"])
    return root


def checked(root: Path, **options) -> dict[str, Source] | str:
    """Return the sources that the pre-flight passes, or what it says."""
    try:
        sources = folder_sources(root, classes=CLASSES, **options)
        report = check_sources(sources)
    except SegFitError as error:
        return str(error)
    for split, source in sources.items():
        counted = sum(
            np.bincount(source.read(i)[1].ravel(), minlength=256) for i in range(len(source))
        )
        assert report.class_pixels[split].tolist() == counted[: len(CLASSES)].tolist()
    return dict(sources)


def read(source: Source) -> None:
    for fit in ("stretch", "pad", "crop"):
        for index in range(len(source)):
            for sample in (
                TrainDataset(source, (33, 47), fit)[index, 5],
                EvalDataset(source, (33, 47), fit)[index],
            ):
                assert sample["image"].shape[0] == 3
                mask = np.asarray(sample["mask"])
                assert ((mask < len(CLASSES)) | (mask == IGNORE_INDEX)).all()
            assert sample["mask"].shape == source.read(index)[1].shape


def put(root: Path, pair: files.Pair) -> None:
    for folder, suffix, data in (
        ("images", pair.image_suffix, pair.image),
        ("masks", pair.mask_suffix, pair.mask),
    ):
        there = root / "train" / folder
        there.mkdir(parents=True, exist_ok=True)
        for old in there.iterdir():
            old.unlink()
        (there / f"one{suffix}").write_bytes(data)


@examples(150)
@given(pair=files.good_pairs())
def test_what_is_good_passes_and_is_read(root, pair):
    put(root, pair)
    sources = checked(root, image_mode=pair.image_mode)
    assert not isinstance(sources, str), sources
    read(sources["train"])


@examples(100)
@given(pair=files.bad_pairs())
def test_what_is_bad_is_refused_by_name(root, pair):
    put(root, pair)
    messages = checked(root, image_mode=pair.image_mode)
    assert isinstance(messages, str)
    assert "one" in messages


@examples(300)
@given(pair=files.damaged_pairs())
def test_what_is_damaged_is_refused_by_name_or_can_be_read(root, pair):
    put(root, pair)
    sources = checked(root, image_mode=pair.image_mode)
    if isinstance(sources, str):
        assert "one." in sources
    else:
        read(sources["train"])


@examples(100)
@given(
    mask=st.sampled_from(["L", "I;16"]),
    pairs=st.dictionaries(st.integers(0, 65535), st.integers(-2, 300), max_size=4),
    ignored=st.none() | st.integers(0, 300),
)
def test_any_label_map_is_refused_or_kept(root, mask, pairs, ignored):
    values = np.array([[*pairs, 0, 1, 7, 255]]) % (256 if mask == "L" else 65536)
    put(root, files.Pair(b"", b"", ".png", ".png", "rgb", None))
    save(root / "train" / "images" / "one.png", noise(*values.shape, 3))
    save(root / "train" / "masks" / "one.png", values.astype("uint8" if mask == "L" else "uint16"))
    sources = checked(root, label_map=pairs or None, ignore_index=ignored)
    if isinstance(sources, str):
        assert sources.strip()
        return
    known = pairs or {0: 0, 1: 1, 2: 2}
    _, read_mask = sources["train"].read(0)
    for value, got in zip(values.ravel().tolist(), read_mask.ravel().tolist(), strict=True):
        target = known.get(value, IGNORE_INDEX if value == ignored else None)
        assert got == (target if target in range(len(CLASSES)) else IGNORE_INDEX)
        assert target is not None


@examples(150)
@given(table=files.tables())
def test_any_table_of_run_lengths_is_refused_or_read(tmp_path_factory, table):
    root = tmp_path_factory.mktemp("rle")
    for name in ("a", "b"):
        save(root / "images" / f"{name}.png", noise(12, 12, 3))
    (root / "masks.csv").write_bytes(table)
    sources = checked(root, masks="masks.csv", mask_format="rle")
    if not isinstance(sources, str):
        read(sources["train"])


@examples(80)
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from(["0_cell", "00000_wall", "1_cell", "1_hat", "x_cell", "0_cell_wall", "_wall", "1_"]),
            st.sampled_from([(9, 9), (9, 9), (9, 9), (4, 9)]),
            st.sampled_from(["L", "L", "1", "RGB"]),
            st.sampled_from([1.0, 1.0, 0.5]),
        ),
        max_size=5,
    )
)  # fmt: skip
def test_any_folder_of_parts_is_refused_or_read(tmp_path_factory, parts):
    root = tmp_path_factory.mktemp("parts")
    for name in ("0", "1"):
        save(root / "images" / f"{name}.png", noise(18, 18, 3))
    save(root / "masks" / "0_wall.png", noise(9, 9, high=2) * 255)
    save(root / "masks" / "1_wall.png", noise(9, 9, high=2) * 255)
    for name, size, mode, kept in parts:
        path = save(root / "masks" / "deep" / f"{name}.png", noise(*size, high=2) * 255, mode)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    sources = checked(root, mask_format="parts")
    if not isinstance(sources, str):
        read(sources["train"])
