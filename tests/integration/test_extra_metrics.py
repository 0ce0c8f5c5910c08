"""Metrics of torchmetrics, added by config, in train.py and in evaluate.py."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.segmentation import HausdorffDistance

from segfit.commands import train as training
from segfit.errors import SegFitError
from segfit.runs import folder as runs
from tests.integration.evaluating import evaluate, write_data
from tests.integration.training import command, compose_run, finished, one_thread, resume, train

HAUSDORFF = "{name: torchmetrics.segmentation.HausdorffDistance, include_background: true, distance_metric: chessboard}"
KAPPA = "torchmetrics.classification.MulticlassCohenKappa"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Train a run at place/"run 1" on place/data, in this process."""
    place = tmp_path_factory.mktemp("extra")
    write_data(place / "data")
    overrides = (
        *("model=cnn", "model.base_channels=8", "model.num_blocks=1", "device=cpu"),
        *("data=folder", f"data.root={place / 'data'}", "data.num_classes=3", "data.background=0"),
        *("image_size=[64,72]", "batch_size=2", "epochs=2", "lr=0.01", "loader.workers=0"),
        f"metrics.extra=[{HAUSDORFF},{KAPPA}]",
    )
    with one_thread():
        training.train(compose_run(*overrides, base=()), overrides, place / "run 1")
    return place


@pytest.fixture(scope="module")
def evaluation(place):
    """Evaluate it with the run's own metrics."""
    return evaluate(place)


def masks(place: Path) -> "list[tuple[np.ndarray, np.ndarray]]":
    """(prediction, ground truth) of every held-out image, as they lie on the disk."""
    truths = place / "data/val/masks"
    return [
        (np.array(Image.open(place / "run 1/evaluation/val/masks" / path.relative_to(truths))), np.array(Image.open(path)))
        for path in sorted(truths.rglob("*.png"))
    ]  # fmt: skip


def test_they_are_in_the_log_in_tensorboard_and_in_the_files(place):
    run = place / "run 1"
    best = json.loads((run / "metrics.json").read_text())["best"]
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("score/multiclass_cohen_kappa")]
    kappas = [line["scores"]["multiclass_cohen_kappa"] for line in lines]
    assert logged == pytest.approx(kappas)
    assert best["multiclass_cohen_kappa"] in kappas
    assert "hausdorff_distance" in best
    log = (run / "train.log").read_text()
    assert all(f"multiclass_cohen_kappa {kappa:.4f} " in log for kappa in kappas)
    assert log.count("hausdorff_distance ") == 2


def test_an_evaluation_finds_the_values_that_training_logged(place, evaluation):
    best = json.loads((place / "run 1/metrics.json").read_text())["best"]
    scores = json.loads((place / "run 1/evaluation/val/metrics.json").read_text())["scores"]
    assert {name: scores[name] for name in best} == pytest.approx(best, abs=1e-6)


def test_kappa_equals_numpy_on_the_saved_masks(place, evaluation):
    confusion = np.zeros((3, 3))
    for prediction, truth in masks(place):
        np.add.at(confusion, (truth[truth != 255], prediction[truth != 255]), 1)
    share = confusion / confusion.sum()
    by_chance = share.sum(0) @ share.sum(1)
    assert evaluation.result.scores["multiclass_cohen_kappa"] == pytest.approx(
        (np.trace(share) - by_chance) / (1 - by_chance), abs=1e-6
    )


def test_hausdorff_equals_torchmetrics_on_the_saved_masks(place, evaluation):
    metric = HausdorffDistance(3, True, "chessboard", input_format="index")
    left_out = 0
    for prediction, truth in masks(place):
        ignored, side = truth == 255, max(truth.shape)
        images = np.zeros((2, 1, side, side), np.int64)
        images[:, 0, : truth.shape[0], : truth.shape[1]] = np.where(ignored, 0, [prediction, truth])
        try:
            metric.update(*torch.from_numpy(images))
        except RuntimeError:
            left_out += 1
    scores = evaluation.result.scores
    assert left_out < 5
    assert scores["hausdorff_distance"] == pytest.approx(metric.compute().item())
    assert scores.get("hausdorff_distance/left_out", 0) == left_out


def test_evaluate_takes_others_or_none(place, tmp_path):
    item = "{name: torchmetrics.segmentation.MeanIoU, per_class: true, score: iou_by_image}"
    done = finished(
        command("run='run 1'", f"metrics.extra=[{item}]", f"out={tmp_path}", script="evaluate.py"),
        place,
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "metrics.json").read_text())["scores"]
    assert list(scores)[-3:] == [f"iou_by_image/class_{index}" for index in range(3)]
    assert f"iou_by_image/class_1 {scores['iou_by_image/class_1']:.4f}" in done.stdout
    none = evaluate(place, metrics={"extra": []}, out=str(tmp_path / "none"))
    assert not [name for name in none.result.scores if "iou_by_image" in name]


def test_a_run_may_go_on_with_other_metrics(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    run = shutil.copytree("run 1", tmp_path / "run")
    longer = resume(run, "epochs=3", "metrics.extra=[]")
    assert list(longer.heard.epochs[-1].result.scores)[-1] == "mean_accuracy"


def test_one_of_them_may_pick_the_best_checkpoint(tmp_path):
    error = "metrics.extra=[torchmetrics.regression.MeanSquaredError,torchmetrics.StatScores]"
    trained = train(tmp_path, error, "monitor=mean_squared_error", "epochs=3")
    errors = [log.result.scores["mean_squared_error"] for log in trained.heard.epochs]
    assert trained.end.best_scores["mean_squared_error"] == min(errors) < max(errors)
    for monitor, reason in [
        ("mean_squared_eror", "Did you mean 'mean_squared_error'?"),
        ("stat_scores/0", "torchmetrics does not say whether more of it is better"),
    ]:
        with pytest.raises(SegFitError, match=re.escape(reason)):
            train(tmp_path / "refused", error, f"monitor={monitor}")


def test_all_wrong_ones_are_refused_before_anything_is_read(tmp_path):
    items = [
        *("os.system", "torchmetrics.segmentation.HausdorfDistance"),
        f"{{name: {KAPPA}, weight: linear}}",
        "torchmetrics.classification.MulticlassAUROC",
    ]
    done = finished(
        command("model=cnn", f"metrics.extra=[{','.join(items)}]", "device=cpu"), tmp_path
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "4 errors" in done.stderr
    for part in (
        "metrics.extra: os.system: must be a metric of torchmetrics.segmentation, ",
        "Did you mean 'HausdorffDistance'?",
        "MulticlassCohenKappa: cannot score an example (ValueError: Unexpected keyword arguments: `weight`)",
        "MulticlassAUROC: cannot score an example",
    ):
        assert part in " ".join(done.stderr.split())
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.parametrize("item", ["7", "[torchmetrics.Accuracy]", "{score: a}"])
def test_a_run_of_unknown_origin_names_metrics_in_plain_values(place, tmp_path, item):
    run = shutil.copytree(place / "run 1", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    head, tail = config.split("  extra:\n")
    kept = tail[tail.index("\nreport:") :]
    (run / "config.yaml").write_text(f"{head}  extra: [{item}]{kept}")
    with pytest.raises(SegFitError, match="must be a name, or"):
        runs.load_config(run)


def test_a_run_of_unknown_origin_gets_nothing_foreign_imported(place, tmp_path):
    run = shutil.copytree(place / "run 1", tmp_path / "run")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(KAPPA, "antigravity.geohash"))
    with pytest.raises(SegFitError, match=r"antigravity.geohash: must be a metric of torchmetrics"):
        evaluate(place, run=str(run))
