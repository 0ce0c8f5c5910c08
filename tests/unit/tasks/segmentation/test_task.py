import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from segfit.engine.distributed import Distributed
from segfit.tasks.segmentation import task as task_module
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.data.dataset import EvalDataset, PredictDataset, collate
from segfit.tasks.segmentation.inference import _kept_neighbours
from segfit.tasks.segmentation.losses import SegmentationLoss
from segfit.tasks.segmentation.metrics import SegmentationMetrics, extra_metrics
from segfit.tasks.segmentation.schema import LossConfig
from segfit.tasks.segmentation.scores import scores_of
from segfit.tasks.segmentation.task import SegmentationTask
from tests.unit.data.files import noise, save

CLASSES = Classes(("background", "a", "b"), background=0)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def task_of(**options) -> SegmentationTask:
    criterion = SegmentationLoss(LossConfig("dice_ce"), 3)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return SegmentationTask(CLASSES, mean, std, criterion=criterion, **options)


class Images:
    """A source of differently sized images with ignored pixels."""

    classes = CLASSES
    sizes = ((40, 52), (33, 61), (64, 40), (50, 50), (35, 35))

    def __len__(self):
        return len(self.sizes)

    def id(self, index):
        return f"image_{index}"

    def files(self, index):
        return []

    def read(self, index):
        mask = noise(*self.sizes[index], seed=index, high=3)
        mask[:5] = IGNORE_INDEX
        return noise(*self.sizes[index], 3, seed=index), mask


def model(images: torch.Tensor) -> torch.Tensor:
    """Answer in half the resolution, as a network might."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, 2, 2, generator=generator)
    return torch.nn.functional.conv2d(images, weight, stride=2).repeat_interleave(2, -1).repeat_interleave(2, -2)  # fmt: skip


def per_pixel(images: torch.Tensor) -> torch.Tensor:
    return images - images.mean(1, keepdim=True)


def evaluate(task, fit, batch_size, source=None, model=model):
    dataset = EvalDataset(source or Images(), (32, 48), fit)
    meter = task.meter()
    for start in range(0, len(dataset), batch_size):
        stop = min(start + batch_size, len(dataset))
        meter.update(model, collate([dataset[index] for index in range(start, stop)]))
    return meter.result()


@pytest.mark.parametrize("channels_last", [False, True])
def test_prepare_normalises_and_leaves_the_batch_alone(channels_last):
    image = torch.from_numpy(noise(2, 3, 8, 6))
    mask = torch.from_numpy(noise(2, 8, 6, high=3))
    before = image.clone()
    inputs, targets = task_of(channels_last=channels_last).prepare(
        {"image": image, "mask": mask}, seed=0
    )
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (MEAN, STD))
    np.testing.assert_allclose(inputs, (image.numpy() / np.float32(255) - mean) / std, rtol=1e-5)
    assert targets.dtype == torch.int64
    assert torch.equal(targets, mask.long())
    assert torch.equal(image, before)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert inputs.is_contiguous(memory_format=layout)


def test_prepare_augments_in_0_to_1_then_mixes_with_another_seed():
    seen = []

    def step(images, masks, *, seed):
        seen.append((float(images.max()), seed))
        return images, masks

    image = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    batch = {"image": image, "mask": torch.zeros(1, 4, 4, dtype=torch.uint8)}
    task_of(augment=step, mix=step).prepare(batch, seed=7)
    assert seen == [(1.0, 7), (1.0, 8)]


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_scores_do_not_depend_on_the_batch_size(fit):
    results = [evaluate(task_of(), fit, size) for size in (1, 2, 5)]
    for other in results[1:]:
        assert np.array_equal(other.values["confusion"], results[0].values["confusion"])
        assert other.scores == pytest.approx(results[0].scores, abs=1e-6)


def test_images_of_other_sizes_in_the_batch_change_nothing():
    # "crop" leaves images at their sizes, so that collate has to pad them; this model sees no neighbours.
    one, all_at_once = (evaluate(task_of(), "crop", size, model=per_pixel) for size in (1, 5))
    assert np.array_equal(one.values["confusion"], all_at_once.values["confusion"])


@pytest.mark.parametrize(("pixels", "times"), [(2**21, [1, 3, 2]), (2 * 40 * 52, [1, 2, 1, 2])])
def test_images_of_one_size_are_counted_at_once(monkeypatch, pixels, times):
    class Alike(Images):
        sizes = ((33, 61), (40, 52), (40, 52), (40, 52), (35, 35), (35, 35))

    counted = []

    def counting(self, predictions, masks):
        counted.append(len(masks))
        update(self, predictions, masks)

    update = SegmentationMetrics.update
    monkeypatch.setattr(SegmentationMetrics, "update", counting)
    monkeypatch.setattr(task_module, "_PIXELS", pixels)
    one, all_at_once = (evaluate(task_of(), "pad", size, Alike()) for size in (1, 6))
    assert counted[6:] == times
    assert np.array_equal(one.values["confusion"], all_at_once.values["confusion"])
    assert one.scores == pytest.approx(all_at_once.scores, abs=1e-6)


class Operations(TorchDispatchMode):
    """Counts what a card would launch: all but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func._schema.returns
        self.count += not any(one.alias_info and not one.alias_info.is_write for one in returned)
        return func(*args, **(kwargs or {}))


def test_a_batch_of_one_size_launches_little_more_than_an_image():
    class Alike(Images):
        sizes = ((33, 61),) * 8

    dataset, launched = EvalDataset(Alike(), (32, 48), "stretch"), []
    for count in (1, 8, 8):
        meter, batch = task_of().meter(), collate([dataset[index] for index in range(count)])
        before = _kept_neighbours.cache_info()
        with Operations() as operations:
            meter.update(model, batch)
        launched.append(operations.count)
    assert launched[2] < 1.1 * launched[0]
    after = _kept_neighbours.cache_info()  # by which rows logits are resized
    assert after.misses == before.misses
    assert after.hits > before.hits


@pytest.mark.parametrize("logits", [1, 3 * 3 * 32 * 48])
def test_losses_do_not_depend_on_how_many_are_worked_out_at_once(monkeypatch, logits):
    class Alike(Images):
        sizes = ((33, 61),) * 8

    expected = evaluate(task_of(), "stretch", 8, Alike()).scores
    monkeypatch.setattr(task_module, "_LOGITS", {"cpu": logits})
    assert evaluate(task_of(), "stretch", 8, Alike()).scores == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_predictions_have_the_size_of_the_mask_and_give_the_scores(fit):
    source, confusion = Images(), np.zeros((3, 3), np.int64)

    def take(index, prediction, mask):
        truth = source.read(index)[1]
        assert prediction.shape == truth.shape
        assert np.array_equal(mask.numpy(), truth)
        valid = truth != IGNORE_INDEX
        np.add.at(confusion, (truth[valid], prediction.numpy()[valid]), 1)

    result = evaluate(task_of(on_prediction=take), fit, 2)
    assert np.array_equal(result.values["confusion"], confusion)
    expected = scores_of(confusion, CLASSES).scores
    assert {name: result.scores[name] for name in expected} == pytest.approx(expected)


def test_loss_is_the_mean_over_images_of_their_own_loss():
    source = Images()
    single = []
    for index in range(len(source)):
        dataset = EvalDataset(source, (32, 48), "pad")
        meter = task_of().meter()
        meter.update(model, collate([dataset[index]]))
        single.append(meter.result().scores["loss"])
    assert evaluate(task_of(), "pad", 5).scores["loss"] == pytest.approx(np.mean(single), abs=1e-6)


def test_an_image_without_a_valid_pixel_counts_nowhere_in_the_loss():
    class Ignored(Images):
        def read(self, index):
            image, mask = super().read(index)
            return image, np.full_like(mask, IGNORE_INDEX) if index == 4 else mask

    class Others(Images):
        sizes = Images.sizes[:4]

    found = evaluate(task_of(), "stretch", 2, Ignored()).scores
    assert found == pytest.approx(evaluate(task_of(), "stretch", 2, Others()).scores, abs=1e-6)


def test_panels_show_the_picture_without_its_padding():
    result = evaluate(task_of(panels={3: "three", 0: "zero"}), "pad", 2)
    assert list(result.panels) == ["zero", "three"]
    for draw, inner in zip(result.panels.values(), [(32, 42), (32, 32)], strict=True):
        (panel,) = draw.args[0]
        assert panel.image.shape == (*inner, 3)
        assert panel.mask.shape == panel.prediction.shape == inner


def test_images_without_masks_are_predicted_and_score_nothing(tmp_path):
    for index, size in enumerate(Images.sizes):
        save(tmp_path / f"{index}.png", noise(*size, 3, seed=index))
    dataset = PredictDataset(tmp_path, (32, 48), "pad")
    predicted, scored = {}, {}
    meter = task_of(on_prediction=lambda i, p, m: predicted.update({i: (p, m)})).meter()
    meter.update(model, collate([dataset[index] for index in range(len(dataset))]))
    evaluate(task_of(on_prediction=lambda i, p, m: scored.update({i: p})), "pad", 5)
    assert all(mask is None for _, mask in predicted.values())
    assert all(torch.equal(predicted[index][0], scored[index]) for index in range(len(Images())))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(np.isnan(value) for value in meter.result().scores.values())


def test_a_batch_that_fails_half_way_is_not_counted_at_all():
    dataset = EvalDataset(Images(), (32, 48), "stretch")
    batch = collate([dataset[index] for index in range(5)])
    expected = evaluate(task_of(), "stretch", 5)
    calls = []

    def fail_once(index, prediction, mask):
        calls.append(index)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    meter = task_of(on_prediction=fail_once).meter()
    with pytest.raises(torch.OutOfMemoryError):
        meter.update(model, batch)
    meter.update(model, batch)
    assert meter.result().scores == expected.scores


@pytest.mark.parametrize(
    ("images", "size", "expected"), [(8, 4, [4, 4]), (5, 4, [3, 2]), (7, 3, [3, 2, 2]), (3, 8, [3])]
)
def test_pieces_are_as_equal_as_can_be(images, size, expected):
    inputs = torch.arange(images)
    pieces = task_of().split(inputs, inputs + 10, size)
    assert [len(part) for part, _ in pieces] == expected
    assert torch.equal(torch.cat([part for part, _ in pieces]), inputs)
    assert all(torch.equal(part + 10, targets) for part, targets in pieces)


def test_processes_with_a_share_each_give_the_scores_of_all_images():
    extra = extra_metrics(
        ["torchmetrics.CohenKappa", "torchmetrics.segmentation.DiceScore"], CLASSES
    )

    class Pair(Distributed):
        """The other process has counted before."""

        size = 2
        other = None

        def gather(self, value):
            Pair.other, before = value, Pair.other
            return [value] if before is None else [before, value]

    alone = evaluate(task_of(extra=extra), "pad", 2)
    dataset = EvalDataset(Images(), (32, 48), "pad")
    for indices in ([0, 2, 4], [1, 3]):
        meter = task_of(extra=extra, distributed=Pair()).meter()
        meter.update(model, collate([dataset[index] for index in indices]))
        result = meter.result()
    assert np.array_equal(result.values["confusion"], alone.values["confusion"])
    assert result.scores == pytest.approx(alone.scores, abs=1e-6)
    assert {"cohen_kappa", "dice_score"} <= set(result.scores)


def test_a_batch_that_fails_halfway_counts_nowhere():
    extra = extra_metrics(["torchmetrics.CohenKappa"], CLASSES)
    calls = []

    def fail_once(*_):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError

    dataset = EvalDataset(Images(), (32, 48), "pad")
    batch = collate([dataset[index] for index in range(5)])
    meter = task_of(extra=extra, on_prediction=fail_once).meter()
    with pytest.raises(torch.OutOfMemoryError):
        meter.update(model, batch)
    meter.update(model, batch)
    assert meter.result().scores == evaluate(task_of(extra=extra), "pad", 5).scores
