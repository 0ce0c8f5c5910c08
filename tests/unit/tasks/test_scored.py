import sys

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from segfit.errors import SegFitError
from segfit.tasks.scored import checked_metrics, merge, restore, state_of

PREDICTIONS = torch.tensor([[0, 1, 2, 1], [0, 0, 2, 1], [2, 2, 2, 2]])
TARGETS = torch.tensor([[0, 1, 1, 1], [0, 2, 2, 1], [0, 1, 2, 2]])


def made(*items):
    return checked_metrics(
        items,
        packages=("classification", "regression", "segmentation"),
        filled={"num_classes": 3, "task": "multiclass", "ignore_index": None},
        example=lambda extra: (PREDICTIONS[:1], TARGETS[:1]),
        labels=("a", "b", "c"),
        taken=("loss",),
    )


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ("torchmetrics.classification.MulticlassF1Score", ("multiclass_f1_score",)),
        ("torchmetrics.JaccardIndex", ("jaccard_index",)),
        ({"name": "torchmetrics.Accuracy", "score": "exactness"}, ("exactness",)),
        (
            {"name": "torchmetrics.segmentation.MeanIoU", "input_format": "index"},
            ("mean_iou",),
        ),
        (
            {"name": "torchmetrics.Accuracy", "average": "none"},
            ("accuracy/a", "accuracy/b", "accuracy/c"),
        ),
        (
            {"name": "torchmetrics.segmentation.MeanIoU", "input_format": "index", "per_class": True, "include_background": False},
            ("mean_iou/b", "mean_iou/c"),
        ),
        # five numbers, none of them a class's
        ("torchmetrics.StatScores", tuple(f"stat_scores/{index}" for index in range(5))),
    ],
)  # fmt: skip
def test_a_metric_is_named_after_its_class_and_its_entries(item, names):
    (extra,) = made(item)
    assert extra.names == names


@pytest.mark.parametrize(
    ("item", "mode"),
    [
        ("torchmetrics.classification.MulticlassF1Score", "max"),
        ("torchmetrics.Accuracy", "max"),
        ("torchmetrics.regression.MeanSquaredError", "min"),
        ("torchmetrics.StatScores", None),
    ],
)
def test_torchmetrics_says_whether_more_is_better(item, mode):
    assert made(item)[0].mode == mode


def test_all_that_is_wrong_is_said_at_once_and_nothing_foreign_imported():
    accuracy = "torchmetrics.classification.MulticlassAccuracy"
    sys.modules.pop("this", None)
    with pytest.raises(SegFitError) as caught:
        made(
            "os.system",
            "this.s",
            "torchmetrics.segmentation.Hausdorf",
            "torchmetrics.text.BLEUScore",
            "torchmetrics.functional.accuracy",
            "torchmetrics.Metric",
            "torchmetrics",
            {"name": accuracy, "averages": "none"},
            "torchmetrics.classification.MulticlassAUROC",
            "torchmetrics.classification.MulticlassConfusionMatrix",
            accuracy,
            {"name": accuracy, "top_k": 1},
            {"name": accuracy, "score": "loss"},
        )
    assert "this" not in sys.modules
    problems = caught.value.problems
    assert len(problems) == 12
    assert all("must be a metric of torchmetrics.classification, " in text for text in problems[:7])
    assert "Did you mean 'HausdorffDistance'?" in problems[2]
    assert "averages" in problems[7]
    assert "one more dimension" in problems[8]
    assert "a result of shape (3, 3) is no score" in problems[9]
    assert "there is a score multiclass_accuracy already" in problems[10]
    assert "there is a score loss already" in problems[11]


def test_processes_merge_exactly():
    # sums, lists that are concatenated, and states that are kept apart
    extras = made(
        "torchmetrics.classification.MulticlassMatthewsCorrCoef",
        {"name": "torchmetrics.segmentation.DiceScore", "input_format": "index"},
        {"name": "torchmetrics.ExplainedVariance", "multioutput": "raw_values"},
    )
    for extra in extras:
        alone, *processes = (extra.make() for _ in range(3))
        for index in range(3):
            inputs = PREDICTIONS[index : index + 1], TARGETS[index : index + 1]
            extra.update(alone, *inputs)
            extra.update(processes[index % 2], *inputs)
        states = [state_of(metric) for metric in processes]
        for metric in processes:
            merge(metric, states)
            assert extra.compute(metric, 3) == pytest.approx(extra.compute(alone, 3))
        half, idle = extra.make(), extra.make()
        for index in (0, 2):
            extra.update(half, PREDICTIONS[index : index + 1], TARGETS[index : index + 1])
        merge(idle, states[:1])
        assert extra.compute(idle, 2) == extra.compute(half, 2)


def test_a_sample_that_a_metric_refuses_is_left_out_and_counted():
    (extra,) = made("torchmetrics.classification.MulticlassAccuracy")
    metric, nothing = extra.make(), extra.make()
    extra.update(metric, PREDICTIONS, TARGETS)
    extra.update(metric, PREDICTIONS, TARGETS + 7)
    extra.update(nothing, PREDICTIONS, TARGETS + 7)
    expected = MulticlassAccuracy(3)(PREDICTIONS, TARGETS).item()
    name = "multiclass_accuracy"
    assert extra.compute(metric, 2) == {name: pytest.approx(expected), f"{name}/left_out": 1}
    scores = extra.compute(nothing, 1)
    assert scores == pytest.approx({name: float("nan"), f"{name}/left_out": 1}, nan_ok=True)
    assert extra.compute(extra.make(), 0) == pytest.approx({name: float("nan")}, nan_ok=True)


def test_running_out_of_memory_is_not_a_refusal(monkeypatch):
    (extra,) = made("torchmetrics.classification.MulticlassAccuracy")
    metric = extra.make()

    def full(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(metric, "update", full)
    with pytest.raises(torch.OutOfMemoryError):
        extra.update(metric, PREDICTIONS, TARGETS)


def test_a_state_can_be_restored():
    for extra in made(
        "torchmetrics.classification.MulticlassAccuracy",
        {"name": "torchmetrics.segmentation.DiceScore", "input_format": "index"},
    ):
        metric, once = extra.make(), extra.make()
        extra.update(metric, PREDICTIONS[:1], TARGETS[:1])
        extra.update(once, PREDICTIONS[:1], TARGETS[:1])
        before = state_of(metric)
        extra.update(metric, PREDICTIONS[1:], TARGETS[1:])
        assert extra.compute(metric, 1) != extra.compute(once, 1)
        restore(metric, before)
        metric.update(PREDICTIONS[2:], TARGETS[2:])
        once.update(PREDICTIONS[2:], TARGETS[2:])
        assert extra.compute(metric, 1) == extra.compute(once, 1)
