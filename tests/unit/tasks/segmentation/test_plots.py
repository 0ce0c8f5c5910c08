import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from segfit.report.files import png
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.plots import confusion_figure


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_rows_are_percent_of_the_true_class_and_zeros_stay_empty():
    confusion = np.array([[75, 25, 0], [1, 99_999, 0], [0, 0, 0]], np.int64)
    figure = confusion_figure(confusion, Classes(("a", "b", "c")))
    assert texts(figure) == ["75.0", "25.0", "100.0"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]
    assert figure.axes[0].get_ylabel() == "ground truth"


@pytest.mark.parametrize("count", [2, 12, 35, 60])
def test_it_renders_with_any_number_of_classes(count):
    classes = Classes(tuple(f"class {index}" for index in range(count)))
    figure = confusion_figure(np.eye(count, dtype=np.int64) * 7, classes)
    picture = np.asarray(Image.open(io.BytesIO(png(lambda: figure))).convert("RGB"))
    assert 300 < picture.shape[0] <= 2000
    assert len(texts(figure)) == (count if count <= 40 else 0)
    assert picture.min() < 100 < picture.max()  # something is drawn


def test_pyplot_with_its_global_state_stays_out():
    code = (
        "import sys, segfit.tasks.segmentation.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
