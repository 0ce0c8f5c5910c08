"""What only a CUDA card can show; `make test-gpu`.

`make test` runs it on the CPU, at toy sizes, where only what a card alone can answer is not asserted: so that it does not go stale.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from segfit.data.batches import DevicePrefetcher
from segfit.engine.checkpoint import Checkpoints
from segfit.engine.optim import make_optimizer, make_scheduler
from segfit.engine.precision import native_precisions, resolve_precision
from segfit.engine.recovery import Recovery
from segfit.engine.state import TrainingState, seed_everything
from segfit.engine.step import make_update
from segfit.engine.task import FitOptions
from segfit.models.build import make_model
from segfit.system.monitor import Recorder
from segfit.tasks.segmentation.augmentation import Mix
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.kornia_gpu import KorniaGpu
from segfit.tasks.segmentation.losses import SegmentationLoss
from segfit.tasks.segmentation.schema import LossConfig
from segfit.tasks.segmentation.task import SegmentationTask
from tests.contracts.augmentation_contract import STILL
from tests.integration.test_diagnose import composed_with, diagnosed, gain_of

ON_CARD = [
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


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=ON_CARD)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda":  # cuBLAS reads it once a process
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device(request.param)


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Let a wait for the card be an error; what was queued before is done by then."""
    if device.type == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def little_memory(state: TrainingState) -> Iterator[None]:
    """Let the card have 6 GiB; the CPU, which has no such limit, none for more than 8 samples at once."""
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(state.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 6 * 2**30 / total))
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    forward = state.forward

    def limited(images: Tensor) -> Tensor:
        if len(images) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(images)

    state.forward = limited
    yield


def make_task(device: torch.device) -> SegmentationTask:
    augment = KorniaGpu(
        **STILL
        | {"hflip": 0.5, "affine": 1.0, "degrees": 20.0, "scale": (0.8, 1.2), "color_jitter": 1.0}
    )
    return SegmentationTask(
        classes=CLASSES,
        criterion=SegmentationLoss(LossConfig("dice_ce"), 4).to(device),
        mean=torch.tensor([0.485, 0.456, 0.406], device=device).view(3, 1, 1),
        std=torch.tensor([0.229, 0.224, 0.225], device=device).view(3, 1, 1),
        augment=augment,
        mix=Mix(num_classes=4, mixup=0.5, cutmix=0.5),
    )


def make_state(name: str, precision_name: str, device: torch.device) -> TrainingState:
    precision, fallback = resolve_precision(precision_name, device)
    assert fallback is None
    model: nn.Module = make_model(CLASSES.names, MODELS[name], pretrained=True)[0]
    model = model.to(device).to(memory_format=torch.channels_last)
    optimizer = make_optimizer(
        model, name="adamw", lr=1e-3, weight_decay=0.01, momentum=0.9, betas=None, head_lr_factor=1,
        layer_decay=1,
    )  # fmt: skip
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


def on_device(device: torch.device, count: int = 4, side: int = 64) -> dict[str, Tensor]:
    return next(iter(DevicePrefetcher([make_batch(count, side)], device)))


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_batch_is_learned_in_every_native_precision(
    model: str, precision: str, device: torch.device
) -> None:
    if precision not in native_precisions(device):
        pytest.skip(f"no native {precision}")
    torch.manual_seed(0)
    state, task = make_state(model, precision, device), make_task(device)
    batches = list(DevicePrefetcher([make_batch()] * 12, device))
    losses = [float(make_update(state, task, [batch], [1], 1.0)[0]) for batch in batches]
    assert all(loss == loss for loss in losses)
    assert losses[-1] < losses[0]


def test_an_update_never_waits_for_the_device(device: torch.device) -> None:
    state, task, batch = make_state("cnn", "fp32", device), make_task(device), on_device(device)
    for seed in range(3):  # cuDNN's search and lazy loading wait, the first time
        make_update(state, task, [batch], [seed], 1.0)
    with waiting_is_an_error(device):
        *_, counted = make_update(state, task, [batch, batch], [3, 4], 1.0)
    assert counted


def test_out_of_memory_is_met_by_smaller_micro_batches(
    device: torch.device, tmp_path: Path
) -> None:
    state, task = make_state("segformer", "fp32", device), make_task(device)
    count, side = (64, 384) if device.type == "cuda" else (16, 32)
    batch, notices = on_device(device, count, side), list[str]()
    options = FitOptions(epochs=1, monitor="miou", clip_grad_norm=1.0)
    recovery = Recovery(
        state, task, Checkpoints(tmp_path), lambda _: [], options, notices.append, tmp_path
    )
    with little_memory(state):
        made = recovery.update([batch])
    assert made is not None
    assert torch.isfinite(made[0])
    assert notices
    assert state.progress.micro_batch == count >> len(notices)


@pytest.mark.parametrize("non_blocking", [True, False])
def test_prefetched_batches_are_the_loaders(non_blocking: bool, device: torch.device) -> None:
    batches = [{"image": torch.full((2, 3, 8, 8), value).byte()} for value in range(20)]
    prefetcher = DevicePrefetcher(batches, device, non_blocking=non_blocking)
    for index, batch in enumerate(prefetcher):
        assert batch["image"].device.type == device.type
        assert (batch["image"] == index).all()


def test_phases_are_timed_on_the_device_without_waiting_for_it(device: torch.device) -> None:
    cuda = device.type == "cuda"
    state, task = make_state("cnn", "fp32", device), make_task(device)
    batch = on_device(device, *((16, 256) if cuda else (2, 32)))
    for seed in range(3):
        make_update(state, task, [batch], [seed], 1.0)
    with Recorder(cuda=cuda) as recorder, waiting_is_an_error(device):
        make_update(state, task, [batch], [3], 1.0)
    spans = {span.name: span for span in recorder.spans()}
    assert set(spans) == {"augmentation", "forward", "backward", "optimizer"}
    for span in spans.values():
        assert (span.device or 0) > 0 if cuda else span.device is None


# What slows a small training down on a card on purpose, and what the verdict calls it.
PROVOKED = {
    "no pinned memory": ("loader.pin_memory=false", "loader.pin_memory"),
    "blocking copies": ("loader.non_blocking=false", "loader.non_blocking"),
    "the host reads the device at every update": ("report.log_every=1", "report.log_every"),
}


@pytest.mark.parametrize("bottleneck", list(PROVOKED))
def test_what_only_a_card_shows_is_among_the_changes_with_its_gain(
    bottleneck: str, tmp_path: Path, device: torch.device
) -> None:
    slowed, key = PROVOKED[bottleneck]
    options = (
        f"device={device.type}", "loader.workers=4", "batch_size=8", "image_size=256", "report.log_every=50", slowed,
    )  # fmt: skip
    if device.type == "cpu":
        composed_with(*options)  # tests/integration/test_diagnose.py has what else is called here
        return
    found = diagnosed(tmp_path, *options, seconds=4.0)
    assert gain_of(found, bottleneck, key) >= 0.95
    assert found.values["timeline"]["device"]["backward"] > 0


# Triton's interpreter runs the same on the CPU, in tests/unit/models/test_fused_head.py.
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_heads_kernels_give_what_fp64_gives(dtype: torch.dtype) -> None:
    from tests.unit.models.test_fused_head import assert_parity, some_maps, some_norm

    maps = [
        one.to(dtype) for one in some_maps(2, 256, "cuda", ((56, 72), (28, 36), (14, 18), (7, 9)))
    ]
    assert_parity(maps, some_norm(256).cuda(), 0.1, 1e-4 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("model", list(MODELS))
def test_deterministic_trainings_are_equal_in_every_bit(model: str, device: torch.device) -> None:
    weights = []
    for _ in range(2):
        seed_everything(0, deterministic=True)
        try:
            state, batch = make_state(model, "fp32", device), on_device(device)
            for seed in range(3):
                make_update(state, make_task(device), [batch], [seed], 1.0)
        finally:
            torch.use_deterministic_algorithms(False)
            for kernel in ("flash", "mem_efficient", "cudnn"):
                getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(True)
        weights.append(torch.cat([one.flatten() for one in state.model.parameters()]))
    assert torch.equal(*weights)
