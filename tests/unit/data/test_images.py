import io
import sys
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from segfit.data import formats
from segfit.data.images import ImageReader, images_at, resize_image
from segfit.errors import SegFitError
from tests.unit.data.files import noise, save

READ = ImageReader()
GRAY = ImageReader("gray")


def smooth(height=24, width=40):
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 6, y * 10, (x + y) * 3], -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1)])
def test_turned_images_of_one_pixel_become_tensors(tmp_path, size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = READ(save(tmp_path / "a.jpg", smooth(*size), exif=exif))
    assert torch.from_numpy(np.require(pixels, requirements=["W"])).ndim == 3


@pytest.mark.parametrize(
    "missing", [(), ("torchcodec.decoders",), ("torchcodec.decoders", "torchvision.io")]
)
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"progressive": True}),
        ("L", {}),
    ],
)
def test_jpeg_equals_pillow_bit_by_bit(tmp_path, monkeypatch, mode, options, missing):
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(formats, "_decode_jpeg", formats._jpeg_decoder())
    path = save(tmp_path / "ü with space.JPG", smooth(), mode, quality=80, **options)
    np.testing.assert_array_equal(READ(path), np.asarray(Image.open(path).convert("RGB")))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(SegFitError, match="unreadable"):
        READ(path)


@pytest.mark.parametrize(
    ("torchcodec", "torchvision", "shade"),
    [
        (
            SimpleNamespace(decode_jpeg=lambda data: torch.full((3, 24, 40), 1, dtype=torch.uint8)),
            True,
            1,
        ),
        (SimpleNamespace(), True, 2),  # an older one, which has no JPEG
        (None, True, 2),
        (None, False, 3),
    ],
)
def test_torchcodec_decodes_jpeg_else_torchvision_else_pillow(
    tmp_path, monkeypatch, torchcodec, torchvision, shade
):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", torchcodec)
    if not torchvision:
        monkeypatch.setitem(sys.modules, "torchvision.io", None)
    second = SimpleNamespace(
        default=lambda data, mode: torch.full((3, 24, 40), 2, dtype=torch.uint8)
    )
    monkeypatch.setattr(torch.ops.image, "decode_jpeg", second)
    monkeypatch.setattr(formats, "_decode_jpeg", formats._jpeg_decoder())
    path = save(tmp_path / "a.jpg", np.full((24, 40, 3), 3, np.uint8))
    assert np.unique(READ(path)) == shade


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / f"a.{suffix}", smooth(), exif=exif)
    image, found = READ.read(path)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(image, expected)
    assert found.orientation == orientation


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp"])
def test_lossless_formats_are_exact(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    pixels = noise(9, 7, 3)
    np.testing.assert_array_equal(READ(save(tmp_path / f"a.{suffix}", pixels, **options)), pixels)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "L", "P", "1"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = save(tmp_path / "a.png", noise(9, 7, 3), mode)
    expected = np.asarray(Image.open(path).convert("RGB"))
    image = READ(path)
    assert image.shape == (9, 7, 3)
    np.testing.assert_array_equal(image, expected)


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    path = save(tmp_path / "a.jpg", smooth(), "CMYK", quality=95)
    assert np.abs(READ(path).astype(int) - smooth()).mean() < 12


def test_transparency_is_dropped_and_colour_kept(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 200  # fully transparent red
    np.testing.assert_array_equal(READ(save(tmp_path / "a.png", pixels)), pixels[..., :3])


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_spans_the_full_range(tmp_path, suffix):
    values = np.array([[0, 257, 65535, 32896]], np.uint16)
    image = READ(save(tmp_path / f"a.{suffix}", values))
    np.testing.assert_array_equal(image[0, :, 0], [0, 1, 255, 128])
    assert (image == image[..., :1]).all()


@pytest.mark.parametrize("suffix", ["png", "jp2"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_every_bit_of_a_file_is_read(tmp_path, suffix, channels, dtype):
    values = noise(48, 40, channels, high=2 ** np.iinfo(dtype).bits, dtype=dtype).squeeze()
    path, options = tmp_path / f"a.{suffix}", {"jp2": {"level": 0}, "png": {}}[suffix]
    encode = {"png": imagecodecs.png_encode, "jp2": imagecodecs.jpeg2k_encode}[suffix]
    path.write_bytes(encode(values, **options))
    found = formats.read_values(path, bands=True).values
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_window_makes_percentiles_black_and_white(tmp_path, dtype):
    values = np.arange(200).reshape(10, 20).astype(dtype)
    path = save(tmp_path / "a.tif", values)
    image = ImageReader("gray", (10, 90))(path)[..., 0].ravel()
    assert (image[:20] == 0).all()
    assert (image[180:] == 255).all()
    assert (np.diff(image[19:180].astype(int)) > 0).all()


def test_window_of_a_mostly_black_image_keeps_what_is_there(tmp_path):
    values = np.zeros((20, 20), np.uint16)
    values[0, :2] = (1000, 2000)
    image = ImageReader("gray", (1, 99))(save(tmp_path / "a.png", values))[..., 0]
    np.testing.assert_array_equal(image[0, :3], [128, 255, 0])


def test_a_constant_image_is_black_not_an_error(tmp_path):
    path = save(tmp_path / "a.png", np.full((4, 4), 700, np.uint16))
    assert ImageReader("gray", (1, 99))(path).max() == 0


def test_float_image_with_not_a_number(tmp_path):
    values = np.array([[-1.0, 0.0, 1.0, np.nan]], np.float32)
    np.testing.assert_array_equal(READ(save(tmp_path / "a.tif", values))[0, :, 0], [0, 128, 255, 0])


def test_gray_mode_takes_the_luminance_of_colours(tmp_path):
    path = save(tmp_path / "a.png", smooth())
    expected = np.asarray(Image.open(path).convert("L"))
    image = GRAY(path)
    for channel in range(3):
        np.testing.assert_array_equal(image[..., channel], expected)


def broken(kind: str) -> bytes:
    buffer = io.BytesIO()
    suffix = "JPEG" if kind.startswith("jpg") else "PNG"
    Image.fromarray(noise(64, 64, 3)).save(buffer, suffix)
    data = buffer.getvalue()
    return {"text": b"<html>404</html>", "empty": b""}.get(kind, data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["jpg", "png", "text", "empty"])
@pytest.mark.parametrize("mode", ["rgb", "gray"])
def test_an_unreadable_file_is_named(tmp_path, kind, mode):
    path = tmp_path / f"bad.{kind if kind in ('jpg', 'png') else 'png'}"
    path.write_bytes(broken(kind))
    with pytest.raises(SegFitError, match=r"bad\.\w+: unreadable \(.+\)") as error:
        ImageReader(mode)(path)
    assert ".cpp" not in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SegFitError, match=r"gone\.png: no such file"):
        READ(tmp_path / "gone.png")


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.jpg", noise(50, 50, 3))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(SegFitError, match=r"bomb\.jpg: larger than .* megapixels"):
        READ(path)


def test_resizing_an_image_is_antialiased():
    stripes = torch.zeros(3, 8, 64, dtype=torch.uint8)
    stripes[..., ::2] = 200
    small = resize_image(stripes, (8, 16))
    assert small.dtype == torch.uint8
    assert small.shape == (3, 8, 16)
    assert small[..., 2:-2].float().sub(100).abs().max() <= 1


def test_images_may_be_a_folder_a_file_or_a_pattern(tmp_path):
    files = [save(tmp_path / name, noise(4, 4)) for name in ("a.png", "b.png", "c.tif")]
    assert images_at(tmp_path) == (files, tmp_path, [])
    assert images_at(files[2]) == (files[2:], tmp_path, [])
    assert images_at(tmp_path / "*.png") == (files[:2], tmp_path, [])
    with pytest.raises(SegFitError, match=r"images=.*\*\.jpg: no such file or folder"):
        images_at(tmp_path / "*.jpg")
