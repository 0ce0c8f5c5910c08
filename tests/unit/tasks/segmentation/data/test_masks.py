import numpy as np
import pytest
import torch
from PIL import Image

from segfit.data.images import resize_image
from segfit.errors import SegFitError
from segfit.tasks.segmentation.classes import IGNORE_INDEX
from segfit.tasks.segmentation.data.masks import ValueMap, read_index_mask, resize_mask
from tests.unit.data.files import noise, save

INDICES = noise(5, 6, high=4)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_grey_masks_are_read_by_value(tmp_path, suffix):
    path = save(tmp_path / f"m.{suffix}", INDICES)
    np.testing.assert_array_equal(read_index_mask(path), INDICES)


def test_palette_masks_are_read_by_index(tmp_path):
    image = Image.fromarray(INDICES, "P")
    image.putpalette([200, 0, 0, 0, 0, 0, 9, 9, 9, 0, 50, 0])
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_index_mask(tmp_path / "m.png"), INDICES)


@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_deep_masks_keep_their_values(tmp_path, dtype):
    values = np.array([[0, 1, 300, 65535]]).astype(dtype)
    path = save(tmp_path / "m.tif", values)
    np.testing.assert_array_equal(read_index_mask(path), values)


def test_one_bit_masks_are_0_and_1(tmp_path):
    path = save(tmp_path / "m.png", (INDICES > 1).astype(np.uint8) * 255, "1")
    np.testing.assert_array_equal(read_index_mask(path), INDICES > 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_equal_channels_are_a_mask(tmp_path, mode):
    path = save(tmp_path / "m.png", INDICES, mode)
    np.testing.assert_array_equal(read_index_mask(path), INDICES)


def test_a_coloured_mask_is_refused(tmp_path):
    path = save(tmp_path / "m.png", noise(5, 6, 3))
    with pytest.raises(SegFitError, match=r"m\.png: a colour picture \(30 colours\)"):
        read_index_mask(path)


def test_of_blended_colours_the_most_frequent_are_offered(tmp_path):
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = (200, 30, 40)
    pixels[:20, 19] = np.linspace((1, 0, 0), (199, 29, 39), 20).astype(np.uint8)
    path = save(tmp_path / "m.png", pixels)
    with pytest.raises(SegFitError, match=r"Edges are blended") as error:
        read_index_mask(path, 2)
    assert "data.colors=[[200, 30, 40], [0, 0, 0]]" in str(error.value)
    with pytest.raises(SegFitError) as error:
        read_index_mask(path, 9)
    assert "Edges are" not in str(error.value)


@pytest.mark.parametrize(
    ("ignore_index", "label_map", "expected", "unknown"),
    [
        (255, None, [0, 1, 255, 255, 255], [2, 300]),
        (None, None, [0, 1, 255, 255, 255], [2, 255, 300]),
        (0, None, [255, 1, 255, 255, 255], [2, 255, 300]),
        (300, None, [0, 1, 255, 255, 255], [2, 255]),
        (255, {0: 0, 255: 1}, [0, 255, 255, 1, 255], [1, 2, 300]),
        (255, {0: 1, 1: 255, 2: 0, 300: 0}, [1, 255, 0, 255, 0], []),
        (7, {0: 0, 1: 1, 2: 7, 255: 7, 300: 1}, [0, 1, 255, 255, 1], []),
    ],
)
@pytest.mark.parametrize("dtype", ["uint16", "int32"])
def test_values_become_classes_or_ignored_or_unknown(
    ignore_index, label_map, expected, unknown, dtype
):
    values = np.array([[0, 1, 2, 255, 300]]).astype(dtype)
    mask, strange = ValueMap(2, ignore_index, label_map).apply(values)
    assert mask.dtype == np.uint8
    assert mask[0].tolist() == expected
    assert strange == unknown


def test_values_that_no_16_bit_file_holds_are_unknown():
    mask, unknown = ValueMap(2, 255, None).apply(np.array([[1, -1, 70000]], np.int32))
    assert mask[0].tolist() == [1, IGNORE_INDEX, IGNORE_INDEX]
    assert unknown == [-1, 70000]


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64"])
@pytest.mark.parametrize(("ignore", "label_map"), [(-1, None), (255, {-1: 255, 0: 0, 1: 1})])
def test_values_below_0_may_be_named(dtype, ignore, label_map):
    values = np.array([[1, -1, 0, -2]]).astype(dtype)
    mask, unknown = ValueMap(2, ignore, label_map).apply(values)
    assert mask[0].tolist() == [1, IGNORE_INDEX, 0, IGNORE_INDEX]
    assert unknown == [-2]


def test_resizing_a_mask_makes_no_new_values():
    mask = torch.from_numpy(noise(31, 17)) // 85 * 85
    small = resize_mask(mask, (13, 40))
    assert small.shape == (13, 40)
    assert set(small.unique().tolist()) <= set(mask.unique().tolist())


def test_image_and_mask_stay_aligned_when_resized():
    mask = torch.zeros(60, 60, dtype=torch.uint8)
    mask[20:40, 10:50] = 255
    image = mask.expand(3, -1, -1)
    small, labels = resize_image(image, (24, 30))[0], resize_mask(mask, (24, 30))
    assert torch.equal(small > 127, labels > 127)
