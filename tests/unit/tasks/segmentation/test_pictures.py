import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segfit.report.files import png
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.pictures import (
    Panel,
    colorize,
    confusion_figure,
    overlay,
    panels_image,
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
    picture = panels_image([panel(size=size)], CLASSES)
    assert picture.dtype == np.uint8
    assert 100 < picture.shape[0] < 500
    assert 450 < picture.shape[1] < 1700


def test_a_panel_shows_errors_only_where_there_are_any():
    good = panel()
    mask = np.where(good.mask == 255, 0, good.mask).astype(np.uint8)
    red = (235, 20, 40)
    assert contains(panels_image([Panel("x", good.image, mask, good.prediction)], CLASSES), red)
    assert not contains(panels_image([Panel("x", good.image, mask, mask)], CLASSES), red)
    # A wrong prediction on ignored pixels is no error.
    ignored = np.full_like(mask, 255)
    assert not contains(
        panels_image([Panel("x", good.image, ignored, good.prediction)], CLASSES), red
    )


def test_the_legend_names_every_class_but_of_very_many_only_those_in_the_picture():
    few, many = (Classes(tuple(f"class {i}" for i in range(n))) for n in (30, 150))
    unused = few.colors[29]
    assert contains(panels_image([panel()], few), unused)
    assert panels_image([panel()], many).shape[0] < panels_image([panel()], few).shape[0]


def test_worst_cases_stack_panels_of_any_size():
    panels = [panel("a", (40, 60)), panel("b", (90, 30))]
    picture = panels_image(panels, CLASSES, ["a: mIoU 0.10", "b: mIoU 0.20"])
    single = [panels_image([one], CLASSES, ["x"]) for one in panels]
    assert picture.shape[1] == max(one.shape[1] for one in single)
    assert picture.shape[0] > max(one.shape[0] for one in single)


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_rows_are_percent_of_the_true_class_and_zeros_stay_empty():
    confusion = np.array([[75, 25, 0], [1, 99_999, 0], [0, 0, 0]], np.int64)
    figure = confusion_figure(confusion, Classes(("a", "b", "c")))
    assert texts(figure) == ["75.0", "25.0", "100.0"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert figure.axes[0].get_ylabel() == "ground truth"


@pytest.mark.parametrize("count", [2, 12, 60])
def test_it_renders_with_any_number_of_classes(count):
    classes = Classes(tuple(f"class {index}" for index in range(count)))
    figure = confusion_figure(np.eye(count, dtype=np.int64) * 7, classes)
    picture = np.asarray(Image.open(io.BytesIO(png(lambda: figure))).convert("RGB"))
    assert 300 < picture.shape[0] <= 2000
    assert len(texts(figure)) == (count if count <= 40 else 0)
    assert picture.min() < 100 < picture.max()  # something is drawn


def test_matplotlib_is_not_imported_before_a_picture_is_drawn():
    code = (
        "import sys, numpy as np, segfit.tasks.segmentation.assembly\n"
        "from segfit.tasks.segmentation.classes import Classes\n"
        "from segfit.tasks.segmentation.pictures import confusion_figure\n"
        "assert 'matplotlib' not in sys.modules\n"
        "confusion_figure(np.eye(2, dtype=np.int64), Classes(('a', 'b')))\n"
        "assert 'matplotlib.pyplot' not in sys.modules  # with its global state"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
