"""Pictures come out of files, and go back, with all of their bits."""

import numpy as np
import pytest
from PIL import Image

from segfit.errors import SegFitError
from segfit.tasks.restoration.data.reading import png, read_picture
from tests.unit.data.files import noise, save


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


def test_what_has_8_bits_is_read_upright_and_without_alpha(tmp_path):
    pixels = noise(8, 16, 4)
    assert read_picture(save(tmp_path / "a.png", pixels), "rgb").shape == (8, 16, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = save(tmp_path / "b.jpg", noise(8, 16, 3), exif=exif)
    assert read_picture(turned, "gray").shape == (16, 8, 1)


def test_other_depths_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(SegFitError, match="neither 8 nor 16 bits"):
        read_picture(tmp_path / "a.tif", "rgb")
