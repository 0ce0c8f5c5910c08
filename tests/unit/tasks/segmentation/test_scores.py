"""The table of a confusion matrix, and boundary scores against a reference that compares every pair of pixels."""

import numpy as np
import pytest

from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.scores import (
    boundary_counts,
    boundary_scores,
    score_table,
    scores_of,
)

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


AROUND = ((0, 1), (1, 0), (0, -1), (-1, 0))


def rim(pixels, truth, index):
    """Return the places of a class that touch a counted place of another one."""
    height, width = truth.shape

    def counted(y, x):
        return 0 <= y < height and 0 <= x < width and truth[y, x] != IGNORE_INDEX

    return [
        (y, x)
        for y, x in np.ndindex(truth.shape)
        if pixels[y, x] == index and counted(y, x)
        if any(counted(y + i, x + j) and pixels[y + i, x + j] != index for i, j in AROUND)
    ]


def near(places, others, tolerance):
    return sum(
        any((y - i) ** 2 + (x - j) ** 2 <= tolerance**2 for i, j in others) for y, x in places
    )


def missed(prediction, truth, index):
    """Return the objects that the prediction leaves out, and all, by flooding."""
    left, objects, without = {*zip(*np.nonzero(truth == index), strict=True)}, 0, 0
    while left:
        todo, one = [left.pop()], set()
        while todo:
            y, x = todo.pop()
            one.add((y, x))
            neighbours = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
            left -= neighbours
            todo += neighbours
        objects += 1
        without += all(prediction[place] != index for place in one)
    return without, objects


@pytest.mark.parametrize("tolerance", [0, 1.5, 2])
def test_they_are_those_of_a_comparison_of_all_pixels(tolerance):
    random = np.random.default_rng(0)
    for _ in range(4):
        truth, prediction = (
            random.integers(3, size=(5, 6)).repeat(4, 0).repeat(4, 1).astype(np.uint8)
            for _ in range(2)
        )
        prediction[:12] = np.roll(truth, 1, 0)[:12]
        truth[random.random(truth.shape) < 0.05] = IGNORE_INDEX
        truth[:, :3] = IGNORE_INDEX
        counts = boundary_counts(prediction, truth, CLASSES, tolerance)
        assert not counts[:, 0].any()  # the background
        f1, surface = [], []
        for index in (1, 2):
            ours, theirs = rim(prediction, truth, index), rim(truth, truth, index)
            hits = near(ours, theirs, tolerance), near(theirs, ours, tolerance)
            expected = [hits[0], len(ours), hits[1], len(theirs)]
            assert counts[:, index].tolist() == [*expected, *missed(prediction, truth, index)]
            precision, recall = hits[0] / len(ours), hits[1] / len(theirs)
            f1.append(2 * precision * recall / (precision + recall))
            surface.append(sum(hits) / (len(ours) + len(theirs)))
        scores = boundary_scores(counts[None], np.array([[False, True, True]]))
        assert scores["boundary_f1"] == pytest.approx(np.mean(f1))
        assert scores["surface_dice"] == pytest.approx(np.mean(surface))
        assert scores["missed_objects"] == counts[4].sum() / counts[5].sum()


def test_what_is_not_there_has_no_score_and_what_is_missed_has_none_of_it():
    truth = np.zeros((20, 20), np.uint8)
    nothing = boundary_scores(boundary_counts(truth, truth, CLASSES, 2), np.array([False] * 3))
    assert np.isnan([*nothing.values()]).all()
    truth[2:5, 2:5] = truth[12:15, 12:15] = 1
    present = np.array([True, True, False])
    missed = boundary_scores(boundary_counts(0 * truth, truth, CLASSES, 2), present)
    assert missed == {"boundary_f1": 0, "surface_dice": 0, "missed_objects": 1}
    half = np.where(np.arange(20) < 10, truth, 0)
    assert boundary_scores(boundary_counts(half, truth, CLASSES, 2), present) == {
        "boundary_f1": pytest.approx(2 / 3), "surface_dice": pytest.approx(2 / 3), "missed_objects": 0.5
    }  # fmt: skip
