"""Pictures come out of files with all of their bits; where they lie, which belong together, and what is wrong with them."""

import numpy as np
import pytest
import tifffile
from omegaconf import OmegaConf
from PIL import Image
from scipy.ndimage import gaussian_filter, uniform_filter1d

from segfit.config.schema import SplitConfig
from segfit.errors import SegFitError
from segfit.tasks.restoration.assembly import Drawn
from segfit.tasks.restoration.data.folder import (
    check_sources,
    folder_sources,
    png,
    read_picture,
    shift,
)
from segfit.tasks.restoration.schema import FolderConfig, PairsConfig
from tests.contracts.source_contract import SourceContract
from tests.integration.restoring import picture, write
from tests.unit.data.files import noise, save, shapes_sources

SMALLEST = {"train": 16, "val": 11, "test": 11}


def sources(kind, root, **options):
    return folder_sources(OmegaConf.structured(kind(root=str(root), **options)), SMALLEST)


def fill(folder, count, first=0):
    for number in range(first, first + count):
        write(folder / f"{number}.png", picture(24, 24, seed=number))


def checking(check, on_bad_sample="fail"):
    return OmegaConf.create({"data": {"check": check, "on_bad_sample": on_bad_sample}})


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
        (FolderConfig, [], "no image in it"),
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
    found = sources(FolderConfig, tmp_path)
    with pytest.raises(SegFitError, match="unreadable"):
        check_sources(checking("full"), found, {"train": 1, "val": 1})
    (notice,) = check_sources(checking("full", "skip"), found, {"train": 1, "val": 1}).notices
    assert notice.startswith("data.on_bad_sample=skip leaves out 1 image:")


def test_16_bits_of_which_few_are_used_are_reported(tmp_path):
    for number in range(4):
        pixels = picture(24, 24, seed=number).astype(np.uint16) * 16
        Image.fromarray(pixels[..., 0]).save(tmp_path / f"{number}.png")
    with pytest.raises(SegFitError, match="4 pictures of 16 bits use few of them"):
        check_sources(checking("full"), sources(FolderConfig, tmp_path), {})
    fill(tmp_path, 9)  # one that is dark among others
    Image.fromarray(pixels[..., 0]).save(tmp_path / "dark.png")
    check_sources(checking("full"), sources(FolderConfig, tmp_path), {})


@pytest.mark.parametrize("dark", ["input", "target"])
def test_of_pairs_both_are_looked_at_and_the_right_file_is_named(tmp_path, dark):
    for side in ("input", "target"):
        for number in range(4):
            pixels = picture(24, 24, seed=number)
            write(
                tmp_path / side / f"{number}.png",
                pixels.astype(np.uint16) * 16 if side == dark else pixels,
            )
    with pytest.raises(SegFitError, match="4 pictures of 16 bits use few") as error:
        check_sources(checking("full"), sources(PairsConfig, tmp_path), {})
    assert str(tmp_path / dark / "0.png") in str(error.value)
    assert str(tmp_path / ("target" if dark == "input" else "input")) not in str(error.value)


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


@pytest.mark.parametrize("names", [("train", "valid", "testing"), ("Training", "val2017", "TEST")])
@pytest.mark.parametrize("level", ["{part}/{side}", "{side}/{part}"])
def test_splits_are_known_by_every_usual_name(tmp_path, names, level):
    for count, part in zip((4, 2, 1), names, strict=True):
        for side in ("input", "target"):
            fill(tmp_path / "pairs" / level.format(part=part, side=side), count)
        fill(tmp_path / "clean" / part, count)
    expected = {"train": 4, "val": 2, "test": 1}
    assert sizes(sources(PairsConfig, tmp_path / "pairs")) == expected
    assert sizes(sources(FolderConfig, tmp_path / "clean")) == expected


def test_a_test_folder_without_targets_is_for_restoring(tmp_path):
    for side in ("input", "target"):
        fill(tmp_path / side / "train", 4)
    fill(tmp_path / "input/test", 2)
    fill(tmp_path / "b/test/input", 2)
    for side in ("input", "target"):
        fill(tmp_path / "b/train" / side, 4)
    assert sizes(sources(PairsConfig, tmp_path)) == {"train": 3, "val": 1}
    found = sources(PairsConfig, tmp_path / "b")
    assert sizes(found) == {"train": 3, "val": 1}
    assert "so it is not used" in check_sources(checking("off"), found, {}).notices[0]


def test_folders_are_not_thrown_together_and_lists_divide(tmp_path):
    for part in ("train", "val", "valid"):
        fill(tmp_path / part, 2)
    with pytest.raises(SegFitError, match="valid are all called after val"):
        sources(FolderConfig, tmp_path)
    (tmp_path / "train.txt").write_text("train/0\nval/0.png\n")
    (tmp_path / "val.txt").write_text("val/1\n")
    found = sources(FolderConfig, tmp_path, split=SplitConfig(lists="."))
    assert sizes(found) == {"train": 2, "val": 1}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_png_keeps_every_value(tmp_path, dtype, channels):
    pixels = noise(37, 53, channels, high=np.iinfo(dtype).max + 1, dtype=dtype)
    file = tmp_path / "a.png"
    file.write_bytes(png(pixels))
    with Image.open(file) as image:  # others can read it
        assert image.size == (53, 37)
    read = read_picture(file, "gray" if channels == 1 else "rgb")
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, pixels)


def test_colours_of_16_bits_become_luminance(tmp_path):
    pixels = noise(9, 7, 3, high=65536, dtype="uint16")
    file = tmp_path / "a.png"
    file.write_bytes(png(pixels))
    expected = pixels @ np.array([0.299, 0.587, 0.114])
    gray = read_picture(file, "gray")
    assert gray.shape == (9, 7, 1)
    assert np.abs(gray[..., 0] - expected).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_grey_tiff_of_16_bits(tmp_path, order):
    pixels = noise(9, 7, high=65536, dtype="uint16")
    mode = "I;16" if order == "<" else "I;16B"
    image = Image.frombytes(mode, (7, 9), pixels.astype(f"{order}u2").tobytes())
    image.save(tmp_path / "a.tif")
    read = read_picture(tmp_path / "a.tif", "rgb")
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, pixels[..., None].repeat(3, 2))


def test_a_colour_tiff_of_16_bits(tmp_path):
    pixels = noise(9, 7, 3, high=65536, dtype="uint16")
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb")
    read = read_picture(tmp_path / "a.tif", "rgb")
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, pixels)


def test_what_has_8_bits_is_read_upright_and_without_alpha(tmp_path):
    pixels = noise(8, 16, 4)
    assert read_picture(save(tmp_path / "a.png", pixels), "rgb").shape == (8, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "b.jpg", noise(8, 16, 3), exif=exif)
    assert read_picture(turned, "gray").shape == (16, 8, 1)


@pytest.mark.parametrize("suffix", ["tif", "png", "webp"])
def test_files_of_several_pictures_are_refused(tmp_path, suffix):
    """Of which all but the first would be lost."""
    first, *others = (Image.fromarray(picture(40, 50, seed=seed)) for seed in range(3))
    file = tmp_path / f"several.{suffix}"
    first.save(file, save_all=True, append_images=others)
    with pytest.raises(SegFitError, match=r"holds 3 pictures .*Save each as a file"):
        read_picture(file, "rgb")


def test_other_depths_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(SegFitError, match="neither 8 nor 16 bits"):
        read_picture(tmp_path / "a.tif", "rgb")
