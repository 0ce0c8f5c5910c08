"""One update equals that of one big batch, however it is cut, and whatever memory allows."""

import contextlib
import copy
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from segfit.engine.distributed import Distributed
from segfit.engine.precision import Precision
from segfit.engine.recovery import halve_micro_batch
from segfit.engine.state import TrainingState
from segfit.engine.step import make_update
from segfit.engine.task import Forward
from segfit.errors import SegFitError
from segfit.models.cnn import CNN
from segfit.tasks.segmentation.augmentation import Mix
from segfit.tasks.segmentation.classes import IGNORE_INDEX, Classes
from segfit.tasks.segmentation.losses import SegmentationLoss
from segfit.tasks.segmentation.schema import LossConfig
from segfit.tasks.segmentation.task import SegmentationTask
from tests.unit.engine.fakes import (
    CPU,
    LineTask,
    Recorder,
    make_fit,
    make_state,
    points,
    spoilt_backward,
    weights,
)

CLASSES = Classes(("background", "liver", "kidney"))
IMAGES = 8


def make_batch() -> dict[str, Tensor]:
    """Eight images; ignored pixels from none to all of an image."""
    numbers = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 3, (IMAGES, 32, 32), generator=numbers, dtype=torch.uint8)
    for index in range(IMAGES):
        masks[index, : index * 32 // (IMAGES - 1)] = IGNORE_INDEX
    images = torch.randint(0, 256, (IMAGES, 3, 32, 32), generator=numbers, dtype=torch.uint8)
    return {"image": images, "mask": masks}


class MixedOnce(SegmentationTask):
    """Mixes the whole batch before it is cut, so that every way to cut sees the same targets."""

    def prepare(self, batch, seed):
        return self.normalise(batch["image"].float() / 255), batch["mixed"]


def with_mixed_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    mix = Mix(num_classes=3, mixup=1.0)
    images, targets = mix(batch["image"].float(), batch["mask"].long(), seed=1)
    assert targets.ndim == 4
    return {"image": images, "mixed": targets, "mask": batch["mask"]}


def make_task(loss: str, soft: bool) -> SegmentationTask:
    criterion = SegmentationLoss(LossConfig(loss), 3, [0.5, 1.0, 2.0])
    kind = MixedOnce if soft else SegmentationTask
    return kind(
        classes=CLASSES,
        criterion=criterion,
        mean=torch.full((3, 1, 1), 0.5),
        std=torch.full((3, 1, 1), 0.25),
    )


def make_cnn_state() -> TrainingState:
    torch.manual_seed(0)
    model = CNN(3, base_channels=4, num_blocks=1, dropout=0.0, norm="none")
    return make_state(model=model, lr=0.1)


def cut(batch: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    pieces = {key: value.split(size) for key, value in batch.items()}
    return [{key: pieces[key][i] for key in pieces} for i in range(len(pieces["image"]))]


def two_updates(loss: str, soft: bool, size: int, clip: float | None) -> tuple[list[float], Tensor]:
    state, task = make_cnn_state(), make_task(loss, soft)
    batch = with_mixed_targets(make_batch()) if soft else make_batch()
    micro_batches = cut(batch, size)
    seen: list[float] = []
    for _ in range(2):
        value, norm, _ = make_update(state, task, micro_batches, range(len(micro_batches)), clip)
        seen += [float(value), float(norm)]
    return seen, weights(state.model)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "mixup"])
@pytest.mark.parametrize("loss", ["ce", "dice_ce", "lovasz_ce"])
def test_accumulated_updates_equal_that_of_one_big_batch(loss, soft, clip):
    expected, expected_weights = two_updates(loss, soft, IMAGES, clip)
    assert expected[0] != pytest.approx(expected[2], rel=1e-4)  # the update did something
    for size in (1, 2, 4):
        seen, trained = two_updates(loss, soft, size, clip)
        assert seen == pytest.approx(expected, abs=1e-5)
        assert torch.allclose(trained, expected_weights, atol=1e-5, rtol=0)


class Pair(Distributed):
    """Two processes, of which the other one always succeeds; records which passes would wait for it."""

    size = 2

    def __init__(self) -> None:
        self.alone = False

    @contextlib.contextmanager
    def no_sync(self, forward: Forward) -> Iterator[None]:
        self.alone = True
        yield
        self.alone = False


@pytest.mark.parametrize("count", [1, 4])
def test_only_the_last_micro_batch_of_an_update_waits_for_other_processes(count):
    state = make_state()
    state.distributed, state.proven = Pair(), True
    backward, alone = Tensor.backward, []

    def noting(self: Tensor) -> None:
        alone.append(state.distributed.alone)
        backward(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", noting)
        batches = [points(2, seed=seed) for seed in range(count)]
        make_update(state, LineTask(), batches, range(count), None)
    assert alone == [True] * (count - 1) + [False]


class SmallMemory:
    """A forward that runs out of memory with more than `fits` images."""

    def __init__(self, model: nn.Module, fits: int) -> None:
        self.model, self.fits = model, fits

    def __call__(self, images: Tensor) -> Tensor:
        if len(images) > self.fits:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        output: Tensor = self.model(images)
        return output


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tmp_path, fits):
    whole = make_fit(tmp_path / "whole", epochs=1)
    train = whole.train
    train.size = 4
    expected = Recorder()
    whole.run(expected, {})

    small = make_fit(tmp_path / "small", epochs=1, train=train)
    small.state.forward = SmallMemory(small.state.model, fits)
    heard = Recorder()
    small.run(heard, {})

    halvings = {1: [4, 2], 2: [4], 3: [4]}[fits]
    assert len(heard.notices) == len(halvings)
    for notice, micro_batch in zip(heard.notices, halvings, strict=True):
        assert f"out of memory with a micro-batch of {micro_batch}: continuing" in notice
        assert f"batch_size={micro_batch // 2}" in notice
    assert list(heard.losses.values()) == pytest.approx(list(expected.losses.values()), abs=1e-5)
    assert torch.allclose(weights(small.state.model), weights(whole.state.model), atol=1e-5)


def test_out_of_memory_between_micro_batches_leaves_no_gradient_behind():
    state, task = make_cnn_state(), make_task("ce", soft=False)
    micro_batches = cut(make_batch(), 4)
    calls = iter([True, False])

    def forward(images: Tensor) -> Tensor:
        if not next(calls):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return state.model(images)

    state.forward = forward
    before = weights(state.model)
    with pytest.raises(torch.OutOfMemoryError):
        make_update(state, task, micro_batches, [0, 1], None)
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert torch.equal(weights(state.model), before)
    assert state.progress.update == 0


def test_running_out_of_memory_in_augmentation_says_so(tmp_path):
    """Smaller micro-batches would not help: whole batches are augmented."""

    class Hungry(LineTask):
        def prepare(self, batch, seed):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    fit, heard = make_fit(tmp_path, task=Hungry()), Recorder()
    with pytest.raises(
        SegFitError, match=r"1 × 2 samples to augment.*accumulate first\. Buy more.*CUDA out"
    ):
        fit.run(heard, {})
    assert heard.notices == []


def test_a_single_sample_that_does_not_fit_raises_with_the_tasks_advice(tmp_path):
    fit = make_fit(tmp_path)
    fit.state.forward = SmallMemory(fit.state.model, 0)
    heard = Recorder()
    with pytest.raises(SegFitError, match=r"single sample\. Buy more memory") as error:
        fit.run(heard, {})
    assert len(error.value.problems) == 1
    assert len(heard.notices) == 1  # 2 → 1 was tried


def test_the_micro_batch_is_halved_from_what_the_data_gives():
    state = make_state()
    halve_micro_batch(state, 6, "", "")
    assert state.progress.micro_batch == 3
    halve_micro_batch(state, 6, "", "")
    assert state.progress.micro_batch == 1


# ------------------------------------------------------------------------------------- fp16


@pytest.mark.parametrize("clip", [None, 1.0])
def test_an_overflow_skips_its_update_and_training_goes_on(tmp_path, clip):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    fit = make_fit(tmp_path, state=make_state(scaler=scaler), epochs=1, clip_grad_norm=clip)
    model, seen = fit.state.model, []

    def forward(images: Tensor) -> Tensor:
        seen.append(weights(model))
        outputs = model(images)
        return spoilt_backward(outputs, math.inf) if len(seen) == 2 else outputs

    fit.state.forward = forward
    heard = Recorder()
    fit.run(heard, {})
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[2], seen[3])
    assert [log.loss_scale for log in heard.logs] == [1024.0, 512.0, 512.0, 512.0]
    assert all(math.isfinite(log.grad_norm) for log in heard.logs)
    assert weights(model).isfinite().all()


def test_the_scale_is_gone_before_gradients_are_clipped_and_logged():
    plain, scaled = make_state(), make_state(scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    micro_batches = [points(4, seed=0), points(4, seed=1)]
    for _ in range(2):
        expected = make_update(plain, LineTask(), micro_batches, [0, 1], 0.1)
        seen = make_update(scaled, LineTask(), micro_batches, [0, 1], 0.1)
        assert torch.allclose(torch.stack(seen), torch.stack(expected), rtol=1e-5)
    assert torch.allclose(weights(scaled.model), weights(plain.model), atol=1e-6)


def test_bf16_runs_the_forward_pass_in_bf16_and_keeps_fp32_weights():
    state = make_state(model=nn.Linear(3, 1))
    state.precision = Precision("bf16", "cpu")
    dtypes = []

    def forward(images: Tensor) -> Tensor:
        output = state.model(images)
        dtypes.append(output.dtype)
        return output

    state.forward = forward
    exact = copy.deepcopy(state.model)
    make_update(state, LineTask(), [points(4, seed=0)], [0], None)
    assert dtypes == [torch.bfloat16]
    assert state.model.weight.dtype == torch.float32
    assert not torch.equal(weights(state.model), weights(exact))
    assert state.device == CPU
