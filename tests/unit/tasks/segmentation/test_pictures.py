import numpy as np
import pytest

from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.pictures import (
    Panel,
    colorize,
    overlay,
    panel_image,
    worst_cases_image,
)

CLASSES = Classes(("background", "liver", "kidney"), background=0)


def panel(name: str = "case_1", size: tuple[int, int] = (40, 60)) -> Panel:
    """Return a noise image whose left half is liver, with an ignored top row and a shifted prediction."""
    height, width = size
    image = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    mask = np.zeros(size, np.uint8)
    mask[:, : width // 2] = 1
    prediction = np.roll(mask, 5, axis=1)
    mask[: height // 4] = 255
    return Panel(name, image, mask, prediction)


def test_colorize_paints_classes_and_stripes_what_is_ignored():
    mask = np.zeros((40, 40), np.uint8)
    mask[:, 10:] = 1
    mask[:, 20:] = IGNORE_INDEX
    painted = colorize(mask, CLASSES)

    assert painted.dtype == np.uint8
    assert (painted[:, :10] == CLASSES.colors[0]).all()
    assert (painted[:, 10:20] == CLASSES.colors[1]).all()
    ignored = painted[:, 20:].reshape(-1, 3)
    assert (ignored[:, 0] == ignored[:, 1]).all()  # grey
    assert (ignored[:, 0] == ignored[:, 2]).all()
    assert len(np.unique(ignored)) == 2  # two greys: stripes


@pytest.mark.parametrize("background", [0, None])
def test_overlay_blends_all_but_the_background(background):
    classes = Classes(("a", "b"), colors=((0, 0, 0), (200, 0, 100)), background=background)
    image = np.full((8, 8, 3), 100, np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[4:] = 1
    blended = overlay(image, mask, classes, alpha=0.25)
    assert (blended[:4] == (100 if background == 0 else 75)).all()
    assert (blended[4:] == (125, 75, 100)).all()


def contains(picture, color):
    return bool((picture == np.array(color)).all(-1).any())


@pytest.mark.parametrize("size", [(12, 9), (40, 60), (900, 300), (300, 2000)])
def test_a_panel_has_a_readable_size_whatever_the_image(size):
    picture = panel_image(panel(size=size), CLASSES)
    assert picture.dtype == np.uint8
    assert 100 < picture.shape[0] < 500
    assert 450 < picture.shape[1] < 1700


def test_a_panel_shows_errors_only_where_there_are_any():
    good = panel()
    mask = np.where(good.mask == 255, 0, good.mask).astype(np.uint8)
    red = (235, 20, 40)
    assert contains(panel_image(Panel("x", good.image, mask, good.prediction), CLASSES), red)
    assert not contains(panel_image(Panel("x", good.image, mask, mask), CLASSES), red)
    # A wrong prediction on ignored pixels is no error.
    ignored = np.full_like(mask, 255)
    assert not contains(panel_image(Panel("x", good.image, ignored, good.prediction), CLASSES), red)


def test_the_legend_names_every_class_but_of_very_many_only_those_in_the_picture():
    few, many = (Classes(tuple(f"class {i}" for i in range(n))) for n in (30, 150))
    unused = few.colors[29]
    assert contains(panel_image(panel(), few), unused)
    assert panel_image(panel(), many).shape[0] < panel_image(panel(), few).shape[0]


def test_worst_cases_stack_panels_of_any_size():
    panels = [panel("a", (40, 60)), panel("b", (90, 30))]
    picture = worst_cases_image(panels, CLASSES, ["a: mIoU 0.10", "b: mIoU 0.20"])
    single = [worst_cases_image([one], CLASSES, ["x"]) for one in panels]
    assert picture.shape[1] == max(one.shape[1] for one in single)
    assert picture.shape[0] > max(one.shape[0] for one in single)
