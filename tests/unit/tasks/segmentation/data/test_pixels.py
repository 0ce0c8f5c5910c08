"""Pixels keep their meaning: what the files hold reaches the network, or it is reported with the remedy."""

import re

import numpy as np
import pytest
import tifffile
from PIL import Image

from segfit.data.formats import read_values
from segfit.data.images import ImageReader
from segfit.data.tiles import LargeImage
from segfit.errors import SegFitError
from segfit.tasks.restoration.data.folder import read_picture
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.masks import read_index_mask
from tests.unit.data.files import noise, save
from tests.unit.tasks.segmentation.data.folders import check_sources, folder_sources

CLASSES = Classes(("background", "cell", "wall"))
COLORS = [[0, 0, 0, 0], [255, 0, 0, 1], [0, 255, 0, 2]]
PALETTE = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)


def masks(count=4):
    return [noise(20, 24, seed=seed, high=3) for seed in range(count)]


def tiff(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels, **options)
    return path


def check(folder, **options):
    sources = folder_sources(folder, classes=CLASSES, split={"val": 0.3}, **options)
    report = check_sources(sources)
    return sources, report.notices


def problem(folder, **options):
    with pytest.raises(SegFitError) as error:
        check(folder, **options)
    return str(error.value)


def write(folder, images, suffix, writer=tiff, **options):
    for index, mask in enumerate(masks()):
        writer(folder / f"images/{index}{suffix}", images(mask), **options)
        save(folder / f"masks/{index}.png", mask)
    return folder


def npy(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, pixels)


def wide(mask):
    return 60 + 40 * mask.astype(int)


def beside_no_data(mask):
    values = mask + noise(20, 24).astype(np.float32) / 999
    return np.where(mask == 0, np.float32(-3e38), values)


def beside_no_data_of_integers(mask):
    return np.where(mask == 0, -32768, wide(mask) + 12.0 * noise(20, 24)).astype(np.int16)


def beside_a_hot_pixel(mask):
    values = (wide(mask) + noise(20, 24, high=500)).astype(np.uint16)
    values.flat[mask.argmax()] = 65535
    return values


def beside_both(mask):
    values = np.where(mask == 0, -9999, wide(mask) + 12.0 * noise(20, 24)).astype(np.int32)
    values.flat[mask.argmax()] = 2**31 - 1
    return values


SHALLOW = {
    "12 bits, grey": (lambda m: (900 + wide(m) + noise(20, 24, high=16)).astype(np.uint16), ".tif"),
    "reflectance": (lambda m: np.dstack([wide(m) + 600] * 3).astype(np.uint16), ".tif"),
    "8 bits in 16": (lambda m: wide(m).astype(np.uint16), ".png"),
    "8 bits in 32": (lambda m: wide(m).astype(np.int32), ".tif"),
    "indices": (lambda m: m, ".png"),
    "floats beside no data": (beside_no_data, ".tif"),
    "integers beside no data": (beside_no_data_of_integers, ".tif"),
    "one hot pixel": (beside_a_hot_pixel, ".png"),
    "no data and a hot pixel": (beside_both, ".tif"),
    "an array": (lambda m: wide(m).astype(np.uint16), ".npy"),
}


@pytest.mark.parametrize("kind", SHALLOW)
def test_images_that_use_a_part_of_their_range_are_reported_with_the_range(tmp_path, kind):
    images, suffix = SHALLOW[kind]
    writer = {".png": save, ".npy": npy}.get(suffix, tiff)
    folder = write(tmp_path / "data", images, suffix, writer)
    values = np.stack([images(mask) for mask in masks()])
    meant = values[(values > -9999) & (values < 65535)]
    least, most = float(meant.min()), float(meant.max())
    reported = problem(folder)
    assert "4 images of 4 would reach the network as nearly one value" in reported
    found = re.search(r"data.value_range=\[(.+), (.+)\]", reported)
    remedy = [float(found[1]), float(found[2])]
    assert remedy == pytest.approx([least, most], abs=0.01)
    sources, notices = check(folder, value_range=remedy)
    assert notices == []
    if "or data.value_range=percentiles" in reported:
        assert check(folder, window=[1, 99])[1] == []
    elif "no data" not in kind:
        pytest.fail("percentiles would do as well")
    image, mask = sources["train"].read(0)
    shades = {int(image[mask == k].max()) for k in range(3)}
    assert len(shades) == 3


def test_a_range_that_was_set_is_not_asked_for_again(tmp_path):
    def clusters(mask):  # each 60 values wide, and far apart
        return (np.where(mask == 0, 0, 60000) + noise(20, 24, high=60)).astype(np.uint16)

    folder = write(tmp_path / "data", clusters, ".png", save)
    assert "data.value_range=[0, 60059]." in problem(folder)
    _, (notice,) = check(folder, value_range=[0, 60059])
    assert "4 images of 4 would reach the network as nearly one value" in notice
    assert "data.value_range" not in notice


def test_one_image_among_others_is_a_notice_and_so_are_blank_ones(tmp_path):
    folder = write(tmp_path / "data", lambda m: noise(20, 24, 3, seed=int(m[0, 0])), ".png", save)
    save(folder / "images/0.png", masks()[0] + 7)
    save(folder / "images/1.png", np.full((20, 24), 90, np.uint8))
    _, notices = check(folder)
    assert "1 image of 4 would reach the network as nearly one value" in notices[0]
    assert "0.png" in notices[0]
    assert "1 image of 4 hold one value alone" in notices[1]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32"])
def test_a_value_range_means_the_same_at_any_depth(tmp_path, dtype):
    values = np.array([[0, 20, 70, 120, 125]]).astype(dtype)
    path = tiff(tmp_path / "a.tif", values)
    image = ImageReader(value_range=(20, 120))(path)
    assert image[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    color = tiff(tmp_path / "b.tif", np.dstack([values, values, values]), photometric="rgb")
    np.testing.assert_array_equal(ImageReader(value_range=(20, 120))(color), image)


LAYOUTS = {
    "strips": {"rowsperstrip": 8},
    "tiles": {"tile": (16, 16)},
    "planes": {"planarconfig": "separate"},
    "planes in tiles": {"planarconfig": "separate", "tile": (16, 16)},
    "big-endian": {"byteorder": ">"},
}
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")


@pytest.mark.parametrize("compression", [None, "zlib", "lzw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tiff_of_any_layout_holds_what_was_written(tmp_path, layout, compression):
    """Whole, and in windows as those that are too large to be read at once."""
    for dtype in DTYPES:
        for count in (3, 4):
            pixels = noise(20, 24 * np.dtype(dtype).itemsize, count).astype(np.uint8)
            pixels = np.moveaxis(np.moveaxis(pixels, 2, 0).copy().view(dtype), 0, 2)
            pixels = np.nan_to_num(pixels, posinf=0, neginf=0)
            stored = np.moveaxis(pixels, 2, 0) if layout.startswith("planes") else pixels
            path = tiff(
                tmp_path / "a.tif", stored, photometric="rgb", compression=compression,
                extrasamples=["unassalpha"] * (count - 3), **LAYOUTS[layout],
            )  # fmt: skip
            found = read_values(path)
            np.testing.assert_array_equal(found.values, pixels[..., :3])
            if count == 4:
                np.testing.assert_array_equal(found.alpha, pixels[..., 3])
            if dtype in ("uint8", "uint16"):
                part = LargeImage(path, ImageReader())[:, slice(3, 19), slice(5, 24)]
                np.testing.assert_array_equal(part.permute(1, 2, 0), ImageReader()(path)[3:19, 5:])
            content = path.read_bytes()
            for kept in (len(content) - 1, len(content) // 2) if dtype != "uint8" else ():
                path.write_bytes(content[:kept])
                with pytest.raises(SegFitError, match=r"a\.tif: unreadable \("):
                    read_values(path)


@pytest.mark.parametrize("bits", [1, 8, 16, 32])
def test_grey_that_is_white_at_zero_looks_the_same_at_any_depth(tmp_path, bits):
    black, most = noise(16, 24, high=2), 2**bits - 1
    stored = black.astype(f"uint{max(bits, 8)}") * np.array(most, f"uint{max(bits, 8)}")
    path = tmp_path / "a.tif"
    tiff(path, stored > 0 if bits == 1 else stored, photometric="miniswhite")
    reader = ImageReader(value_range=(0, most) if bits == 32 else None)
    np.testing.assert_array_equal(reader(path)[..., 0], 255 - 255 * black)
    np.testing.assert_array_equal(read_index_mask(path), stored)
    if bits in (8, 16):
        part = LargeImage(path, reader)[:, slice(0, 16), slice(0, 24)]
        np.testing.assert_array_equal(part[0], 255 - 255 * black)


def test_a_tiff_of_colours_that_are_no_rgb_is_named(tmp_path):
    colors = noise(9, 8, 3, high=2**16, dtype="uint16")
    for path in (
        tiff(tmp_path / "lab.tif", colors, photometric="cielab"),
        tiff(tmp_path / "complex.tif", colors[..., 0].astype(np.complex64)),
    ):
        with pytest.raises(SegFitError, match=r"\.tif: unreadable \(.* PhotometricInterpretation"):
            ImageReader()(path)


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("count", [2, 4, 5, 8])
def test_bands_that_would_be_dropped_are_asked_for(tmp_path, count, dtype, planar):
    pixels = noise(20, 24, count).astype(dtype)
    stored = pixels if planar == "contig" else np.moveaxis(pixels, -1, 0)
    path = tiff(
        tmp_path / "a.tif", stored, photometric="minisblack", planarconfig=planar,
        extrasamples=[0] * (count - 1),
    )  # fmt: skip
    with pytest.raises(SegFitError, match=rf"a\.tif: holds {count} bands.*data\.bands=\[1, 2"):
        ImageReader()(path)
    with pytest.raises(SegFitError, match=rf"a\.tif: holds {count} bands"):
        read_picture(path, "rgb")
    bands = (2, 1)
    image = ImageReader(bands=bands, value_range=(0, 255))(path)
    np.testing.assert_array_equal(image, pixels[..., [1, 0]].astype(np.uint8))
    with pytest.raises(SegFitError, match="asks for more"):
        ImageReader(bands=(count + 1,))(path)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_smaller_copy_in_a_tiff_is_no_page(tmp_path, kind):
    pixels = noise(8, 6, 3).astype(kind)
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(pixels, photometric="rgb")
        file.write(pixels[::2, ::2], photometric="rgb", subfiletype=1)
    read = read_values(path)
    assert read.frames == 1
    np.testing.assert_array_equal(read.values, pixels)
    with tifffile.TiffWriter(path, append=True) as file:
        file.write(pixels, photometric="rgb")
    assert read_values(path).frames == 2


def test_pages_and_transparency_can_be_bands(tmp_path):
    pixels = noise(9, 8, 4)
    stack = tiff(tmp_path / "a.tif", np.moveaxis(pixels, -1, 0), photometric="minisblack")
    picture = save(tmp_path / "a.png", pixels)
    array = tmp_path / "a.npy"
    npy(array, pixels)
    for path in (stack, picture, array):
        image = ImageReader(bands=(4, 3, 2, 1))(path)
        np.testing.assert_array_equal(image, pixels[..., ::-1])


def test_transparency_is_reported_where_it_says_something(tmp_path):
    folder = write(
        tmp_path / "data", lambda m: np.dstack([noise(20, 24, 3), m * 127]), ".png", save
    )
    _, (notice,) = check(folder)
    assert "4 images with transparency, which is dropped" in notice
    write(folder, lambda m: np.dstack([noise(20, 24, 3), m * 0 + 255]), ".png", save)
    assert check(folder)[1] == []


@pytest.mark.parametrize("dtype", ["uint32", "int64", "float32", "float64"])
@pytest.mark.parametrize("suffix", [".tif", ".npy"])
def test_masks_of_any_depth_are_read_by_value(tmp_path, dtype, suffix):
    mask = masks()[0]
    path = tmp_path / f"m{suffix}"
    (npy if suffix == ".npy" else tiff)(path, mask.astype(dtype))
    np.testing.assert_array_equal(read_index_mask(path), mask)
    if dtype.startswith("float"):
        (npy if suffix == ".npy" else tiff)(path, mask.astype(dtype) + 0.5)
        with pytest.raises(SegFitError, match="numbers that are not whole"):
            read_index_mask(path)


def adaptive(mask):
    return Image.fromarray(PALETTE[mask]).convert("P", palette=Image.Palette.ADAPTIVE, colors=3)


def with_palettes(folder):
    for index, mask in enumerate(masks(6)):
        mask[mask == 1 + index % 2] = 0  # not every image shows every class
        save(folder / f"images/{index}.png", noise(20, 24, 3, seed=index))
        (folder / "masks").mkdir(exist_ok=True)
        adaptive(mask).save(folder / f"masks/{index}.png")
    return folder


def test_palettes_that_differ_by_file_are_reported_and_colours_are_read(tmp_path):
    folder = with_palettes(tmp_path / "data")
    reported = problem(folder)
    assert "their palettes differ" in reported
    assert "data.colors=[[" in reported
    assert "[255, 0, 0]" in reported
    assert "[0, 255, 0]" in reported
    # If the indices are meant after all, saying so is enough.
    _, (notice, *_) = check(folder, label_map={0: 0, 1: 1, 2: 2})
    assert "their palettes differ" in notice
    sources, notices = check(folder, colors=COLORS)
    assert notices == []
    for source in sources.values():
        for index in range(len(source)):
            number = int(source.id(index))
            mask = masks(6)[number]
            mask[mask == 1 + number % 2] = 0
            np.testing.assert_array_equal(source.read(index)[1], mask)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colour_masks_are_read_by_a_table(tmp_path, mode):
    folder = tmp_path / "data"
    for index, mask in enumerate(masks()):
        save(folder / f"images/{index}.png", noise(20, 24, 3, seed=index))
        save(folder / f"masks/{index}.png", PALETTE[mask], mode)
    if mode != "P":
        assert "data.colors=[[0, 0, 0], [0, 255, 0], [255, 0, 0]]" in problem(folder)
    sources, notices = check(folder, colors=[*COLORS[:2], [0, 255, 0, 255]])
    assert notices[0].startswith("No pixel of wall in the training masks")
    _, mask = sources["train"].read(0)
    expected = masks()[int(sources["train"].id(0))]
    np.testing.assert_array_equal(mask, np.where(expected == 2, 255, expected))
    reported = problem(folder, colors=COLORS[:2])
    assert "with colours that data.colors does not list" in reported
    assert "[0, 255, 0]" in reported


def test_floats_and_negative_numbers_scaled_one_by_one_are_reported(tmp_path):
    folder = write(tmp_path / "data", lambda m: wide(m).astype(np.int16) - 1000, ".tif")
    _, (notice,) = check(folder)
    assert "numbers beyond 16 bits (-940 to -860), each scaled from its own" in notice
    assert "data.value_range=[-940, -860]" in notice
    assert check(folder, value_range=[-1000, 1000])[1] == []
