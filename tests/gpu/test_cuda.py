"""What only a CUDA card can show; `make test-gpu`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from segfit.data.batches import DevicePrefetcher
from segfit.engine.optim import make_optimizer, make_scheduler
from segfit.engine.precision import native_precisions, resolve_precision
from segfit.engine.recovery import halve_micro_batch
from segfit.engine.state import TrainingState, seed_everything
from segfit.engine.step import make_update
from segfit.models.build import make_model
from segfit.system.monitor import Recorder
from segfit.tasks.segmentation.augmentation import Mix
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.kornia_gpu import KorniaGpu
from segfit.tasks.segmentation.losses import SegmentationLoss
from segfit.tasks.segmentation.schema import LossConfig
from segfit.tasks.segmentation.task import SegmentationTask
from tests.contracts.augmentation_contract import STILL
from tests.integration.test_diagnose import diagnosed
from tests.unit.models.test_fused_head import assert_parity, some_maps, some_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]

CLASSES = Classes(("background", "a", "b", "c"), background=0)
MODELS = {
    "cnn": {"name": "cnn", "base_channels": 16, "num_blocks": 1, "dropout": 0.1},
    "segformer": {
        "name": "segformer",
        "variant": "b0",
        "weights": None,
        "fast": True,
        "dropout": 0.1,
        "drop_path": 0.1,
        "checkpointing": False,
    },
}


def make_task(device: torch.device) -> SegmentationTask:
    augment = KorniaGpu(
        **STILL
        | {"hflip": 0.5, "affine": 1.0, "degrees": 20.0, "scale": (0.8, 1.2), "color_jitter": 1.0}
    )
    return SegmentationTask(
        classes=CLASSES,
        criterion=SegmentationLoss(LossConfig("dice_ce"), 4).to(device),
        mean=torch.tensor([0.485, 0.456, 0.406], device="cuda").view(3, 1, 1),
        std=torch.tensor([0.229, 0.224, 0.225], device="cuda").view(3, 1, 1),
        augment=augment,
        mix=Mix(num_classes=4, mixup=0.5, cutmix=0.5),
    )


def make_state(model: nn.Module, precision_name: str, device: torch.device) -> TrainingState:
    precision, fallback = resolve_precision(precision_name, device)
    assert fallback is None
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(
        model, name="adamw", lr=1e-3, weight_decay=0.01, momentum=0.9, betas=None, head_lr_factor=1
    )
    scheduler = make_scheduler(
        optimizer,
        name="cosine",
        updates_per_epoch=10,
        epochs=1,
        warmup=0.1,
        warmup_factor=0.1,
        min_factor=0.0,
        poly_power=0.9,
        step_epochs=30,
        step_gamma=0.1,
    )
    scaler = precision.scaler(65536.0, 2000)
    return TrainingState(model, model, optimizer, scheduler, scaler, None, precision, device)


def make_batch(count: int = 4, side: int = 64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (count, 3, side, side), generator=generator).byte(),
        "mask": torch.randint(0, 4, (count, side, side), generator=generator).byte(),
        "index": torch.arange(count),
    }


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_batch_is_learned_in_every_native_precision(model: str, precision: str) -> None:
    device = torch.device("cuda")
    if precision not in native_precisions(device):
        pytest.skip(f"no native {precision}")
    torch.manual_seed(0)
    state = make_state(make_model(CLASSES, MODELS[model], pretrained=True)[0], precision, device)
    task = make_task(device)
    batches = list(DevicePrefetcher([make_batch()] * 12, device))
    losses = [float(make_update(state, task, [batch], [1], 1.0)[0]) for batch in batches]
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[0]


def test_an_update_never_waits_for_the_device() -> None:
    device = torch.device("cuda")
    state = make_state(make_model(CLASSES, MODELS["cnn"], pretrained=True)[0], "fp32", device)
    task = make_task(device)
    batch = next(iter(DevicePrefetcher([make_batch()], device)))
    for seed in range(3):  # cuDNN's search and lazy loading wait, the first time
        make_update(state, task, [batch], [seed], 1.0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_update(state, task, [batch, batch], [3, 4], 1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_is_met_by_smaller_micro_batches() -> None:
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    state = make_state(make_model(CLASSES, MODELS["segformer"], pretrained=True)[0], "fp32", device)
    task = make_task(device)
    batch = next(iter(DevicePrefetcher([make_batch(64, 512)], device)))
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 6 * 2**30 / total))
    notices = []
    try:
        while True:
            try:
                loss, _ = make_update(state, task, [batch], [0], 1.0)
                break
            except torch.OutOfMemoryError:
                pass
            notices.append(halve_micro_batch(state, 64, "", ""))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert notices
    assert state.progress.micro_batch < 64
    assert torch.isfinite(loss)


@pytest.mark.parametrize("non_blocking", [True, False])
def test_prefetched_batches_are_the_loaders(non_blocking: bool) -> None:
    device = torch.device("cuda")
    batches = [{"image": torch.full((2, 3, 8, 8), value).byte()} for value in range(20)]
    prefetcher = DevicePrefetcher(batches, device, non_blocking=non_blocking)
    for index, batch in enumerate(prefetcher):
        assert batch["image"].device.type == "cuda"
        assert (batch["image"] == index).all()


def test_phases_are_timed_on_the_device_without_waiting_for_it() -> None:
    device = torch.device("cuda")
    state = make_state(make_model(CLASSES, MODELS["cnn"], pretrained=True)[0], "fp32", device)
    task = make_task(device)
    batch = next(iter(DevicePrefetcher([make_batch(16, 256)], device)))
    for seed in range(3):
        make_update(state, task, [batch], [seed], 1.0)
    torch.cuda.synchronize()
    with Recorder(cuda=True) as recorder:
        torch.cuda.set_sync_debug_mode("error")
        try:
            make_update(state, task, [batch], [3], 1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    spans = {span.name: span for span in recorder.spans()}
    assert set(spans) == {"augmentation", "forward", "backward", "optimizer"}
    for span in spans.values():
        assert span.device is not None
        assert span.device > 0


# What slows a small training down on a card on purpose, and what the verdict calls it.
PROVOKED = {
    "no pinned memory": ("loader.pin_memory=false", "loader.pin_memory"),
    "blocking copies": ("loader.non_blocking=false", "loader.non_blocking"),
    "the host reads the device at every update": ("report.log_every=1", "report.log_every"),
}


@pytest.mark.parametrize("bottleneck", list(PROVOKED))
def test_what_only_a_card_shows_is_among_the_changes_with_its_gain(
    bottleneck: str, tmp_path: Path
) -> None:
    slowed, key = PROVOKED[bottleneck]
    found = diagnosed(
        tmp_path, "device=cuda", "loader.workers=4", "batch_size=8", "image_size=256", "report.log_every=50", slowed,
        seconds=4.0,
    )  # fmt: skip
    changes = next(table for table in found.tables if table.name == "changes")
    named = [row for row in changes.rows if row[0] == bottleneck]
    assert len(named) == 1
    assert str(named[0][1]).startswith(f"{key}=")
    assert named[0][2] >= 0.95
    assert found.values["timeline"]["device"]["backward"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_heads_kernels_give_what_fp64_gives(dtype: torch.dtype) -> None:
    maps = [
        one.to(dtype) for one in some_maps(2, 256, "cuda", ((56, 72), (28, 36), (14, 18), (7, 9)))
    ]
    assert_parity(maps, some_norm(256).cuda(), 0.1, 1e-4 if dtype == torch.float32 else 0.01)


def test_deterministic_trainings_are_equal_in_every_bit() -> None:
    device, weights = torch.device("cuda"), []
    for _ in range(2):
        seed_everything(0, deterministic=True)
        try:
            state = make_state(
                make_model(CLASSES, MODELS["cnn"], pretrained=True)[0], "fp32", device
            )
            batch = next(iter(DevicePrefetcher([make_batch()], device)))
            for seed in range(3):
                make_update(state, make_task(device), [batch], [seed], 1.0)
        finally:
            torch.use_deterministic_algorithms(False)
        weights.append(torch.cat([one.flatten() for one in state.model.parameters()]))
    assert torch.equal(*weights)
