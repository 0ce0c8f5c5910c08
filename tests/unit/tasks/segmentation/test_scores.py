import numpy as np

from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.scores import score_table, scores_of

CLASSES = Classes(("background", "liver", "kidney"), background=0)


def test_absent_classes_have_no_score_and_count_in_no_mean():
    confusion = np.array([[90, 10, 0], [20, 60, 20], [0, 0, 0]], np.int64)
    table = score_table(scores_of(confusion, CLASSES), CLASSES)
    background, liver, kidney = table.rows
    assert liver == ["liver", 60 / 110, 120 / 170, 0.6, 100, 0.5]
    assert kidney == ["kidney", None, None, None, 0, 0.0]
    macro, foreground = table.totals
    assert macro[:2] == ["macro mean", (background[1] + liver[1]) / 2]
    assert foreground[:4] == ["foreground mean", *liver[1:4]]
    assert table.caption == "pixel accuracy 0.7500"
    assert table.colors == CLASSES.colors


def test_without_a_background_there_is_no_mean_over_the_foreground():
    classes = Classes(("a", "b"))
    table = score_table(scores_of(np.eye(2, dtype=np.int64), classes), classes)
    assert [row[0] for row in table.totals] == ["macro mean"]


def test_without_any_pixel_every_score_is_absent():
    table = score_table(scores_of(np.zeros((3, 3), np.int64), CLASSES), CLASSES)
    assert table.totals[0][1:4] == [None, None, None]
    assert table.caption == "pixel accuracy –"
