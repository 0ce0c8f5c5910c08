import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import multiclass_confusion_matrix

from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.metrics import SegmentationMetrics, extra_metrics, inputs_of
from segfit.tasks.segmentation.scores import Scores, confusion_matrices

CLASSES = Classes(names=("sky", "road", "car", "bus", "pole"), background=0)
ABSENT = 3  # predicted now and then, never true


def batch(images: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Predictions that are right half of the time, and masks with ignored pixels, without `ABSENT`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, 9, 13)
    masks = torch.randint(0, len(CLASSES), shape, generator=generator)
    masks[masks == ABSENT] = 0
    guess = torch.randint(0, len(CLASSES), shape, generator=generator)
    predictions = torch.where(torch.rand(shape, generator=generator) < 0.5, masks, guess)
    masks[torch.rand(shape, generator=generator) < 0.15] = IGNORE_INDEX
    masks[0, 0, 0], predictions[0, 0, 0] = 1, ABSENT
    return predictions, masks


def scored(predictions: Tensor, masks: Tensor, classes: Classes = CLASSES) -> Scores:
    metrics = SegmentationMetrics(classes)
    metrics.update(predictions, masks)
    return metrics.compute()


def by_definition(
    predictions: NDArray[np.int64], masks: NDArray[np.int64]
) -> dict[str, dict[int, float]]:
    """IoU, F1 and recall of each class that is true somewhere, as sets of pixels."""
    valid = masks != IGNORE_INDEX
    result: dict[str, dict[int, float]] = {"iou": {}, "f1": {}, "accuracy": {}}
    for c in np.unique(masks[valid]):
        true, predicted = (masks == c) & valid, (predictions == c) & valid
        precision = (true & predicted).sum() / max(predicted.sum(), 1)
        recall = (true & predicted).sum() / true.sum()
        result["iou"][c] = (true & predicted).sum() / (true | predicted).sum()
        result["f1"][c] = 2 * precision * recall / (precision + recall)
        result["accuracy"][c] = recall
    return result


def test_scores_follow_their_definitions() -> None:
    predictions, masks = batch()
    result = scored(predictions, masks)
    expected = by_definition(predictions.numpy(), masks.numpy())
    for measure, of_class in expected.items():
        for c, score in of_class.items():
            assert result.per_class[measure][CLASSES.names[c]] == pytest.approx(score)
    mean = {measure: np.mean(list(values.values())) for measure, values in expected.items()}
    foreground = {
        measure: np.mean([score for c, score in values.items() if c != CLASSES.background])
        for measure, values in expected.items()
    }
    valid = masks != IGNORE_INDEX
    assert result.scores == pytest.approx(
        {
            "miou": mean["iou"],
            "macro_f1": mean["f1"],
            "foreground_iou": foreground["iou"],
            "foreground_f1": foreground["f1"],
            "pixel_accuracy": (predictions == masks)[valid].double().mean().item(),
            "mean_accuracy": mean["accuracy"],
        }
    )
    assert result.confusion.sum() == valid.sum()


def test_confusion_has_truth_in_rows() -> None:
    predictions, masks = batch()
    expected = multiclass_confusion_matrix(
        predictions, masks, num_classes=len(CLASSES), ignore_index=IGNORE_INDEX
    )
    np.testing.assert_array_equal(scored(predictions, masks).confusion, expected.numpy())
    single = confusion_matrices(torch.tensor([[[2]]]), torch.tensor([[[1]]]), 3)
    assert single[0, 1, 2] == single.sum() == 1


def test_a_class_that_is_only_predicted_has_no_score_but_costs_the_others() -> None:
    predictions, masks = batch()
    result = scored(predictions, masks)
    name = CLASSES.names[ABSENT]
    assert [values[name] for values in result.per_class.values()] == [None, None, None]
    present = [score for score in result.per_class["iou"].values() if score is not None]
    assert result.scores["miou"] == pytest.approx(np.mean(present))
    fixed = torch.where(predictions == ABSENT, masks % IGNORE_INDEX, predictions)
    assert scored(fixed, masks).scores["miou"] > result.scores["miou"]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_batch_size_and_padding_change_nothing(size: int) -> None:
    predictions, masks = batch()
    metrics = SegmentationMetrics(CLASSES)
    for start in range(0, len(masks), size):
        pad = (0, start, 0, 2 * start)
        metrics.update(
            F.pad(predictions[start : start + size], pad, value=1).to(torch.uint8),
            F.pad(masks[start : start + size], pad, value=IGNORE_INDEX).to(torch.uint8),
        )
    result, expected = metrics.compute(), scored(predictions, masks)
    assert result.scores == expected.scores
    assert result.per_class == expected.per_class


def test_processes_merge_and_reset_forgets() -> None:
    predictions, masks = batch()
    parts = [SegmentationMetrics(CLASSES) for _ in range(2)]
    parts[0].update(predictions[:3], masks[:3])
    parts[1].update(predictions[3:], masks[3:])
    parts[0].confusion += parts[1].confusion
    np.testing.assert_array_equal(
        parts[0].compute().confusion, scored(predictions, masks).confusion
    )
    parts[0].reset()
    parts[0].update(predictions[:1], masks[:1])
    assert parts[0].compute().scores == scored(predictions[:1], masks[:1]).scores


def test_without_background_the_foreground_is_everything() -> None:
    predictions, masks = batch()
    scores = scored(predictions, masks, Classes(CLASSES.names)).scores
    assert scores["foreground_iou"] == scores["miou"]
    assert scores["foreground_f1"] == scores["macro_f1"]


def test_nothing_valid_is_undefined_not_zero() -> None:
    predictions, masks = batch()
    result = scored(predictions, torch.full_like(masks, IGNORE_INDEX))
    assert not result.confusion.any()
    assert all(math.isnan(score) for score in result.scores.values())
    background_only = scored(torch.zeros_like(masks), torch.zeros_like(masks))
    assert background_only.scores["miou"] == 1
    assert math.isnan(background_only.scores["foreground_iou"])


def test_counts_beyond_float_and_int32_stay_exact() -> None:
    metrics = SegmentationMetrics(CLASSES)
    metrics.confusion += 2**53
    metrics.update(torch.tensor([[[1]]]), torch.tensor([[[1]]]))
    assert metrics.compute().confusion[1, 1] == 2**53 + 1
    metrics.reset()
    assert metrics.confusion.dtype == torch.int64
    assert not metrics.confusion.any()


def test_a_mask_value_that_is_no_class_is_an_error() -> None:
    with pytest.raises(RuntimeError):
        scored(torch.zeros(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 7))


def test_updates_do_not_wait_for_the_device() -> None:
    """The meta device has no data, so that whatever reads a value or a count from it fails."""
    predictions, masks = (part.to("meta") for part in batch())
    metrics = SegmentationMetrics(CLASSES).to("meta")
    metrics.update(predictions, masks)
    assert metrics.confusion.is_meta


def test_it_is_a_metric_of_torchmetrics() -> None:
    predictions, masks = batch()
    metrics = MetricCollection({"ours": SegmentationMetrics(CLASSES)})
    metrics.update(predictions, masks)
    parts = [SegmentationMetrics(CLASSES) for _ in range(2)]
    parts[0].update(predictions[:3], masks[:3])
    parts[1].update(predictions[3:], masks[3:])
    parts[0].merge_state(parts[1])
    assert parts[0].compute().scores == scored(predictions, masks).scores
    assert metrics["ours"].compute().scores == scored(predictions, masks).scores


def added(item: Any, predictions: Tensor, masks: Tensor) -> dict[str, float]:
    """Scores of an extra metric, image by image."""
    (extra,) = extra_metrics([item], CLASSES)
    metric = extra.make()
    for prediction, mask in zip(predictions, masks, strict=True):
        extra.update(metric, *inputs_of(extra, prediction, mask, CLASSES))
    return extra.compute(metric, len(masks))


def test_ignored_pixels_count_in_no_extra_metric_that_can_leave_them_out() -> None:
    predictions, masks = (part.to(torch.uint8) for part in batch())
    counted = masks != IGNORE_INDEX
    p, t = predictions[counted].double(), masks[counted].double()
    module = "torchmetrics.classification"
    assert added(f"{module}.Accuracy", predictions, masks)["accuracy"] == pytest.approx(
        (p == t).double().mean().item()
    )
    assert added("torchmetrics.regression.MeanSquaredError", predictions, masks) == {
        "mean_squared_error": pytest.approx((p - t).square().mean().item())
    }
    # without the class that is ignored besides them
    own = {"name": f"{module}.MulticlassAccuracy", "ignore_index": 1, "average": "micro"}
    assert added(own, predictions, masks)["multiclass_accuracy"] == pytest.approx(
        (p == t)[t != 1].double().mean().item()
    )


def test_other_extra_metrics_find_the_background_at_ignored_pixels() -> None:
    prediction, mask = torch.zeros(1, 16, 16).long(), torch.zeros(1, 16, 16).long()
    for index in range(1, len(CLASSES)):
        mask[0, 3 * index, 3:9] = prediction[0, 3 * index, 3:9] = index
    mask[0, 3, 6:9] = IGNORE_INDEX  # would be 3 pixels too far
    assert added("torchmetrics.segmentation.HausdorffDistance", prediction, mask) == {
        "hausdorff_distance": 0
    }
    assert added("torchmetrics.segmentation.HausdorffDistance", prediction, prediction % 4) == {
        "hausdorff_distance": pytest.approx(math.inf)  # by torchmetrics' definition
    }


@pytest.mark.parametrize("shape", [(30, 30), (30, 60), (60, 30)])
def test_hausdorff_is_right_for_images_that_are_not_square(shape: tuple[int, int]) -> None:
    masks = torch.zeros(2, *shape).long()
    masks[0, 0:15, 5:20] = masks[1, 0:22, 10:28] = 1
    inner = -F.max_pool2d(-F.pad((masks == 1).float(), (1, 1, 1, 1)), 3, 1)
    edges = [part.nonzero().double() for part in (masks == 1) & (inner == 0)]
    distances = torch.cdist(*edges)
    (extra,) = extra_metrics(["torchmetrics.segmentation.HausdorffDistance"], Classes(("a", "b")))
    metric = extra.make()
    extra.update(metric, *inputs_of(extra, masks[0], masks[1], Classes(("a", "b"))))
    expected = max(distances.amin(0).max(), distances.amin(1).max())
    assert extra.compute(metric, 1) == {"hausdorff_distance": pytest.approx(expected.item())}
