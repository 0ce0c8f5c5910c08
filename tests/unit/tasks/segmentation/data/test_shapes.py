import numpy as np
import pytest

from segfit.data.shapes import ShapesSource
from segfit.tasks.segmentation.classes import Classes
from tests.contracts.source_contract import LabelledSourceContract
from tests.unit.data.files import shapes_sources


class TestShapesContract(LabelledSourceContract):
    def make_sources(self, folder):
        sources = shapes_sources(6, 2, 2, resolution=64, data_seed=3)
        for source in sources.values():
            source.classes = Classes(("background", "liver", "kidney", "spleen"))
        return sources


@pytest.fixture(scope="module")
def drawn():
    source = ShapesSource(40)
    images, masks = zip(*(source.read(i) for i in range(len(source))), strict=True)
    return np.stack(images), np.stack(masks)


def test_an_image_depends_on_seed_and_number_alone():
    few, many = shapes_sources(2, 1, 1, 64, 0), shapes_sources(9, 5, 1, 64, 0)
    np.testing.assert_array_equal(few["val"].read(0)[0], many["val"].read(0)[0])
    assert few["val"].id(0) == "val_0000"
    other = shapes_sources(2, 1, 1, 64, 1)
    assert (other["val"].read(0)[0] != few["val"].read(0)[0]).mean() > 0.5


def test_an_index_outside_is_an_error():
    with pytest.raises(IndexError):
        ShapesSource(3).read(3)


@pytest.mark.parametrize("resolution", [32, 100, 160])
def test_draws_at_any_resolution(resolution):
    image, mask = ShapesSource(1, resolution=resolution).read(0)
    assert image.shape == (resolution, resolution, 3)
    assert set(np.unique(mask)) <= {0, 1, 2, 3}


def test_every_class_occurs_often_and_is_sometimes_absent(drawn):
    _, masks = drawn
    for label in (1, 2, 3):
        share = np.mean([(mask == label).any() for mask in masks])
        assert 0.6 < share < 1.0
        assert 0.02 < (masks == label).mean() < 0.15


def test_brightness_alone_tells_no_organ_apart(drawn):
    images, masks = drawn
    gray = images.mean(-1)
    inside = gray > 60  # the body
    counts = [np.histogram(gray[(masks == c) & inside], 32, (0, 255))[0] for c in range(4)]
    shares = [count / count.sum() for count in counts]
    for first in range(4):
        for second in range(first):
            assert np.minimum(shares[first], shares[second]).sum() > 0.4


def test_channels_differ_by_class_so_that_swapped_ones_show(drawn):
    images, masks = drawn
    warmth = images[..., 0].astype(float) - images[..., 2]
    warm, cool = warmth[masks == 1].mean(), warmth[masks == 3].mean()
    assert warm - cool > 20
