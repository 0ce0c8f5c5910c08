"""Files that nobody should have in a data set: each is read as it is meant, or named; nothing hangs or raises else."""

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segfit.data.images import ImageReader
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.dataset import EvalDataset, PredictDataset, TrainDataset
from segfit.tasks.segmentation.data.masks import read_index_mask
from tests.unit.data.files import names, noise, png, save, write_pairs
from tests.unit.tasks.segmentation.data.folders import check_sources, folder_sources

CLASSES = Classes(("background", "cell", "wall"))


def check(folder: Path, **options):
    sources = folder_sources(folder, classes=CLASSES)
    return sources, check_sources(sources, **options)


@pytest.fixture
def data(tmp_path):
    return write_pairs(tmp_path / "data", names(6))


def problems(data: Path) -> list[str]:
    with pytest.raises(SegFitError) as error:
        check(data)
    return error.value.problems


# ------------------------------------------------------------------------ what is no picture


def fifo(path: Path) -> None:
    os.mkfifo(path)


def endless_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def text(path: Path) -> None:
    path.write_text("<html>404</html>")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def bomb(path: Path) -> None:
    path.write_bytes(png(60_000, 60_000, 8, 2, b"\0" * 1000))


def postscript(path: Path) -> None:
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 12\n%%EndComments\nquit\n")


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize(
    "make",
    [fifo, endless_device, loop, dangling, text, nothing, bomb, postscript],
    ids=lambda make: make.__name__,
)
def test_what_is_no_picture_is_named_by_the_check_and_the_datasets(data, kind, make):
    path = data / kind / "003.png"
    path.unlink()
    make(path)
    (problem,) = problems(data)
    assert str(path) in problem
    source = folder_sources(data, classes=CLASSES)["train"]
    index = source.names.index("003")
    for read in (
        lambda: TrainDataset(source, (8, 8), "pad")[index, 0],
        lambda: EvalDataset(source, (8, 8), "crop")[index],
    ):
        with pytest.raises(SegFitError, match=r"003\.png"):
            read()
    if kind == "images":
        with pytest.raises(SegFitError, match=r"003\.png"):
            PredictDataset(data / kind, (8, 8), "pad")[3]


def test_a_folder_with_the_name_of_a_picture_holds_none(data):
    for kind in ("images", "masks"):
        (data / kind / "x.png").mkdir()
    sources, report = check(data)
    assert sum(map(len, sources.values())) == 6
    assert report.notices == []


@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
@pytest.mark.parametrize("mode", ["rgb", "gray"])
def test_a_file_that_was_cut_off_is_named_unless_every_pixel_is_there(tmp_path, suffix, mode):
    buffer = io.BytesIO()
    Image.fromarray(noise(40, 40, 3)).save(buffer, suffix)
    content = buffer.getvalue()
    path = tmp_path / "cut.png"
    path.write_bytes(content)
    whole = ImageReader(mode)(path)
    last = range(len(content) - 30, len(content))
    whole_enough = []
    for length in sorted({*range(0, len(content), 97), *last}):
        path.write_bytes(content[:length])
        try:
            np.testing.assert_array_equal(ImageReader(mode)(path), whole)
            whole_enough.append(length)
        except SegFitError as error:
            assert "cut.png: unreadable (" in str(error)  # noqa: PT017
    # Of a PNG the last chunk but one holds the pixels, up to its checksum.
    assert whole_enough == [
        length for length in last if suffix == "PNG" and length >= len(content) - 20
    ]


def test_memory_stays_small_over_bombs(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(png(60_000, 60_000, 8, 2, b"\0" * 10_000_000))
    with (tmp_path / "4.jpg").open("wb") as file:  # a picture, then 8 GB of nothing
        Image.fromarray(noise(8, 8, 3)).save(file, "JPEG")
        file.truncate(8 << 30)
    code = """if True:
        import resource, sys
        from pathlib import Path
        from segfit.data.images import ImageReader
        from segfit.errors import SegFitError
        ImageReader()(Path(sys.argv[1]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(Path(sys.argv[2]).iterdir()):
            try:
                print(ImageReader()(path).shape)
            except SegFitError:
                print("refused")
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    small = save(tmp_path.parent / "small.png", noise(8, 8, 3))
    done = subprocess.run(
        [sys.executable, "-c", code, small, tmp_path], capture_output=True, text=True, check=True
    )
    *read, kib = done.stdout.splitlines()
    assert read == ["refused"] * 4 + ["(8, 8, 3)"]
    assert int(kib) < 64 * 1024


# --------------------------------------------------------------- unusual, but what it is is clear


@pytest.mark.parametrize(("depth", "values"), [(1, [0, 1]), (2, [0, 1, 2, 3]), (4, [0, 1, 9, 15])])
def test_masks_of_few_bits_hold_what_was_written(tmp_path, depth, values):
    packed = "".join(f"{value:0{depth}b}" for value in values).ljust(16, "0")
    path = tmp_path / "m.png"
    path.write_bytes(png(len(values), 1, depth, 0, b"\0" + int(packed, 2).to_bytes(2, "big")))
    assert read_index_mask(path).tolist() == [values]


@pytest.mark.parametrize(("color", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_16_bits_a_channel_are_read_whole(tmp_path, color, channels):
    path = tmp_path / "deep.png"
    levels = [0, 257, 32896, 65535, 300]
    row = b"".join(struct.pack(">H", level) * channels for level in levels)
    path.write_bytes(png(len(levels), 1, 16, color, b"\0" + row))
    image = ImageReader()(path)
    np.testing.assert_array_equal(image[0, :, 0], [0, 1, 128, 255, 1])
    assert (image == image[..., :1]).all()
    assert ImageReader(value_range=(0, 300))(path)[0, 1, 0] == 218  # of 257, not of its upper byte
    assert read_index_mask(path).tolist() == [levels]


@pytest.mark.parametrize("tagged", [("images",), ("images", "masks")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_image_and_mask_agree_however_the_camera_was_held(tmp_path, orientation, tagged):
    mask = noise(10, 14, high=3)
    turned = {
        1: mask,
        2: mask[:, ::-1],
        3: mask[::-1, ::-1],
        4: mask[::-1],
        5: mask.T,
        6: np.rot90(mask),
    }
    turned |= {7: mask[::-1, ::-1].T, 8: np.rot90(mask, 3)}
    stored = np.ascontiguousarray(turned[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind, scale in (("images", 100), ("masks", 1)):
        pixels, options = (stored, {"exif": exif}) if kind in tagged else (mask, {})
        for name in names(2):
            save(tmp_path / "data" / kind / f"{name}.png", pixels * np.uint8(scale), **options)
    sources, report = check(tmp_path / "data")
    image, found = sources["train"].read(0)
    np.testing.assert_array_equal(found, mask)
    np.testing.assert_array_equal(image[..., 1], mask * 100)
    assert len([notice for notice in report.notices if "EXIF" in notice]) == (orientation != 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1)])
@pytest.mark.parametrize("fit", ["stretch", "pad", "crop"])
def test_a_picture_of_one_pixel_is_one(tmp_path, size, fit):
    write_pairs(tmp_path / "data", names(3), size=size)
    sources, _ = check(tmp_path / "data")
    sample = TrainDataset(sources["train"], (8, 12), fit)[0, 5]
    assert sample["image"].shape == (3, 8, 12)
    assert (sample["mask"] != 255).any()
    held_out = EvalDataset(sources["val"], (8, 12), fit)[0]
    assert held_out["mask"].shape == size


@pytest.mark.parametrize("suffix", ["gif", "tif", "png", "webp"])
def test_several_frames_are_reported_of_images_and_refused_of_masks(data, suffix):
    frames = [Image.fromarray(noise(12, 16, seed=seed)) for seed in range(3)]
    path = data / f"images/003.{'png' if suffix == 'gif' else suffix}"
    (data / "images/003.png").unlink()
    frames[0].save(
        path, suffix.replace("tif", "tiff"), save_all=True, append_images=frames[1:], lossless=True
    )
    _, report = check(data)
    (notice,) = report.notices
    assert f"{path} (3)" in notice
    assert "the first is used" in notice
    (data / "masks/003.png").write_bytes(path.read_bytes())
    (problem,) = problems(data)
    assert "003.png: holds 3 frames; a mask has one." in problem


def test_what_a_phone_appends_to_a_photo_is_no_frame(data):
    photos = [Image.fromarray(noise(12, 16, 3, seed=seed)) for seed in range(2)]
    (data / "images/003.png").unlink()
    photos[0].save(data / "images/003.jpg", "MPO", save_all=True, append_images=photos[1:])
    _, report = check(data)
    assert report.notices == []


@pytest.mark.parametrize("size", [(13, 16), (12, 15), (16, 12), (24, 32)])
def test_a_mask_of_another_size_is_reported_with_both(data, size):
    save(data / "masks/004.png", noise(*size, high=3))
    (problem,) = problems(data)
    assert f"004.png (image 16×12, mask {size[1]}×{size[0]} (width × height))" in problem


def test_palettes_with_transparency_are_pictures_by_colour_and_masks_by_index(tmp_path):
    indices = noise(5, 6, high=3)
    image = Image.fromarray(indices, "P")
    palette = [200, 0, 0, 0, 120, 0, 9, 9, 90]
    image.putpalette(palette)
    image.save(tmp_path / "p.png", transparency=bytes([0, 128, 255]))
    np.testing.assert_array_equal(read_index_mask(tmp_path / "p.png"), indices)
    colors = np.array(palette, np.uint8).reshape(3, 3)
    np.testing.assert_array_equal(ImageReader()(tmp_path / "p.png"), colors[indices])


@pytest.mark.parametrize("values", [[np.nan] * 4, [np.inf, -np.inf, 0, 1], [np.nan, np.inf, 5, 5]])
@pytest.mark.parametrize("window", [None, (1.0, 99.0)])
def test_float_pictures_of_no_numbers_are_read(tmp_path, recwarn, values, window):
    path = save(tmp_path / "f.tif", np.array([values], np.float32))
    assert ImageReader("gray", window)(path).shape == (1, 4, 3)
    assert [str(warning.message) for warning in recwarn] == []
