"""What runs on a CUDA card alone, on one that is not there: nothing waits, and nothing is on the wrong device.

Every model with every optimizer, for every task: copies, updates, logging and validation.
"""

import io
import sys
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

import segfit.tasks
from segfit.assembly.data import make_train_batches
from segfit.assembly.task import assembly_of
from segfit.config.tasks import task_names
from segfit.data import gpu_decoding
from segfit.data.batches import DevicePrefetcher
from segfit.tasks.segmentation.kornia_gpu import KorniaGpu
from tests.fakes.card import DEVICE, Card, Stream, card
from tests.fakes.training import TrainingOnCard
from tests.integration.training import ROOT
from tests.unit.composing import composed
from tests.unit.data.files import noise, save

OPTIMIZERS = [path.stem for path in sorted((ROOT / "conf" / "optimizer").glob("*.yaml"))]
FUSED = ("adamw", "sgd")

BASE = (
    "hardware=cpu", "batch_size=4", "accumulate=2", "clip_grad_norm=1.0", "ema_decay=0.99",
    "loader.workers=0", "report.log_every=1",
)  # fmt: skip
AUGMENTED = [
    "augmentation=kornia-gpu", "augmentation.hflip=1.0", "augmentation.vflip=1.0", "augmentation.affine=0.5",
    "augmentation.color_jitter=0.7", "augmentation.hue=0.1", "augmentation.blur=0.7", "augmentation.noise=0.7",
]  # fmt: skip
TASKS = {
    "segmentation": [
        "data=shapes", "data.train_size=16", "data.val_size=3", "data.resolution=48", "image_size=64", *AUGMENTED,
    ],
    "restoration": [
        "data=shapes", "data.train_size=4", "data.val_size=2", "data.resolution=48", "patch_size=32",
    ],
    "forecasting": ["data=waves", "data.lookback=48"],
}  # fmt: skip
PERCEPTUAL = ["loss.perceptual=0.1", "loss.encoder=test_resnet", "loss.weights=null"]
# (model, precision, what else): each model of conf/ once at least; the larger SegFormers are b0 in large
MODELS = {
    "segmentation": [
        ("segformer_b0", "bf16", ["loss=dice_ce", "augmentation.mixup=1.0"]),
        ("segformer_b0", "fp16", ["loss=focal", "model.fast=false", "model.checkpointing=true"]),
        ("cnn", "fp16", ["loss=lovasz_ce", "augmentation.cutmix=1.0", "data.fit=crop"]),
        ("timm_unet", "fp32", ["loss=tversky", "model.encoder=test_resnet"]),
        ("vit", "bf16", ["loss=ce", "model.encoder=test_vit"]),
    ],
    "restoration": [
        ("cnn", "fp16", ["loss=psnr", "model.num_blocks=1", "tile=32", "degrade=mixed"]),
        (
            "nafnet",
            "bf16",
            ["model.num_blocks=1", "tile=32", "degrade=blur", "degrade.kind=motion", *PERCEPTUAL],
        ),
    ],
    "forecasting": [
        ("linear", "fp32", ["loss=mae"]),
        ("lstm", "fp16", ["loss=quantile", "data.place=device"]),
        ("lstm_64", "bf16", ["loss=huber"]),
        ("transformer", "bf16", ["data.place=device"]),
        ("transformer_256", "fp16", ["data.place=loader"]),
    ],
}
CASES = [(task, *model) for task, models in MODELS.items() for model in models]
SMALL = {"cnn": ["model.base_channels=8"], "nafnet": ["model.base_channels=8"]}
WEIGHTS = ("segformer_b0", "timm_unet", "vit")


@pytest.fixture(scope="module")
def optimizers() -> dict[str, DictConfig]:
    return {name: composed(f"optimizer={name}").optimizer for name in OPTIMIZERS}


def trained(
    card: Card, config: DictConfig, precision: str, optimizers: dict[str, DictConfig]
) -> None:
    """Train and validate; an update waits nowhere, but where GradScaler reads what a fused optimizer reads itself."""
    training = TrainingOnCard(card, config, precision)
    training.update()
    training.validate()
    for name, optimizer in optimizers.items():
        training.update_by(optimizer)
        waits = [wait for wait in card.waits if wait.phase in ("copied", "updated")]
        if precision == "fp16" and name not in FUSED:
            waits = [wait for wait in waits if "scaler.step" not in wait.line]
            card.waits -= {wait for wait in card.waits if "scaler.step" in wait.line}
        assert not waits, name
    unsaid = [wait for wait in card.waits if wait.phase != "made" and not wait.said]
    assert not unsaid, "a comment has to say that a line synchronises"


@pytest.mark.parametrize(("task", "model", "precision", "more"), CASES)
def test_a_training_waits_for_the_card_where_it_says_so(task, model, precision, more, optimizers):
    options = [*TASKS[task], *SMALL.get(model, []), *more]
    options += ["model.weights=null"] if model in WEIGHTS else []
    config = composed(f"task={task}", f"model={model}", *BASE, *options)
    with card() as fake:
        trained(fake, config, precision, optimizers)
    if task == "segmentation":
        assert {"grid_sampler_2d", "flip", "normal_", "lerp"} <= fake.kernels.keys()


@pytest.mark.parametrize(
    ("accumulate", "mode"), [(1, "reduce-overhead"), pytest.param(2, None, marks=pytest.mark.slow)]
)
def test_cuda_graphs_are_asked_for_where_an_update_is_one_pass(accumulate, mode, optimizers):
    options = ("compile=true", "compile_mode=reduce-overhead", f"accumulate={accumulate}")
    config = composed("model=cnn", *BASE, *TASKS["segmentation"], *SMALL["cnn"], *options)
    compiled = mock.Mock(side_effect=lambda module, mode: module)
    with mock.patch("torch.compile", compiled), card() as fake:
        trained(fake, config, "bf16", {"adamw": optimizers["adamw"]})
    assert [call.kwargs["mode"] for call in compiled.mock_calls] == [mode]


class Decoder:
    """Stands for nvImageCodec's: pixels (H, W, 3) of the files' sizes, made in torch's stream of the moment."""

    streams: ClassVar[set[int]] = set()

    def __init__(self, **options: Any) -> None:
        assert options == {"device_id": 0, "backends": None, "options": ":fancy_upsampling=1"}

    def decode(self, files: list[NDArray[np.uint8]], cuda_stream: int) -> list[Tensor]:
        self.streams.add(cuda_stream)
        sizes = [Image.open(io.BytesIO(file)).size[::-1] for file in files]
        return [torch.empty(*size, 3, dtype=torch.uint8, device=DEVICE) for size in sizes]


@pytest.fixture
def photographs(tmp_path, monkeypatch) -> list[str]:
    """Options of a training on JPEG files of two sizes that the card decodes."""
    codec = SimpleNamespace(nvimgcodec=SimpleNamespace(Decoder=Decoder))
    monkeypatch.setitem(sys.modules, "nvidia", codec)
    monkeypatch.setattr(gpu_decoding, "from_dlpack", lambda image: image)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    Decoder.streams.clear()
    for number in range(20):
        height, width = (60, 70) if number % 2 else (90, 64)
        save(tmp_path / f"images/{number}.jpg", noise(height, width, 3, seed=number))
        save(tmp_path / f"masks/{number}.png", noise(height, width, seed=number, high=3))
    data = ["data=folder", f"data.root={tmp_path}", "data.num_classes=3", "data.fit=pad"]
    return [*data, "data.decode=gpu", "image_size=64"]


def test_what_the_card_decodes_is_decoded_beside_the_updates(photographs, optimizers):
    mirrored = ["augmentation.vflip=0.0", "augmentation.swap=[[1,2]]"]
    options = [*photographs, *SMALL["cnn"], *AUGMENTED, *mirrored]
    config = composed("model=cnn", *BASE, *options)
    mirror = KorniaGpu.mirrored
    swapping = mock.patch.object(KorniaGpu, "mirrored", autospec=True, side_effect=mirror)
    with swapping as swapped, card() as fake:
        trained(fake, config, "bf16", {"adamw": optimizers["adamw"]})
    assert swapped.called
    assert "_upsample_bilinear2d_aa" in fake.kernels  # fitted on the card
    assert Decoder.streams
    assert fake.main.cuda_stream not in Decoder.streams


@pytest.mark.parametrize(
    ("owner", "name", "expected"),
    [(Tensor, "record_stream", "may overwrite it"), (Stream, "wait_stream", "has made it")],
)
def test_a_fault_beside_the_updates_is_caught_where_the_card_decodes(
    photographs, owner, name, expected
):
    config = composed("model=cnn", *BASE, *photographs, "augmentation=none")
    with card() as fake, mock.patch.object(owner, name):
        source = assembly_of(config).make_sources(config)["train"]
        batch = next(make_train_batches(config, source, DEVICE, 0).epoch(0, 0))
        batch["image"].float()
    assert expected in str(fake.waits)


def test_a_task_of_ones_own_is_watched_too(optimizers, monkeypatch):
    home = ROOT / "tests" / "other_task"
    monkeypatch.setattr(segfit.tasks, "__path__", [*segfit.tasks.__path__, str(home)])
    config = composed("task=signal", f"--config-dir={home / 'conf'}", *BASE)
    with card() as fake:
        trained(fake, config, "bf16", optimizers)


def test_every_model_is_tried():
    for task, models in MODELS.items():
        folder = ROOT / "conf" / "model" / ("" if task == "segmentation" else task)
        names = {path.stem for path in folder.glob("*.yaml")}
        assert names - {f"segformer_b{size}" for size in range(1, 6)} == {
            name for name, *_ in models
        }
    assert set(task_names()) - {"signal"} == set(MODELS)


def prefetched(pinned: bool = True, non_blocking: bool = True) -> Tensor:
    batch = {"image": torch.ones(2, 3)}
    batch = {name: one.pin_memory() for name, one in batch.items()} if pinned else batch
    (moved,) = DevicePrefetcher([batch], DEVICE, non_blocking=non_blocking)
    return moved["image"] * 2


def forgetful(owner: type, name: str) -> Callable[[Tensor, Tensor], Tensor]:
    def plant(*_: Tensor) -> Tensor:
        with mock.patch.object(owner, name):
            return prefetched()

    return plant


# What a change could bring in, of values and a mask on the card.
PLANTED = {
    "a number": lambda values, mask: values[0].item(),
    "a branch": lambda values, mask: bool(mask.any()),
    "a list": lambda values, mask: values.tolist(),
    "a copy to the host": lambda values, mask: values.cpu(),
    "values by a mask": lambda values, mask: values[mask],
    "values set by a mask": lambda values, mask: values.index_put_((mask,), values[0]),
    "values by a list": lambda values, mask: values[[0, 1]],
    "values by an index on the host": lambda values, mask: values[torch.tensor([0, 1])],
    "masked_select": lambda values, mask: values.masked_select(mask),
    "nonzero": lambda values, mask: mask.nonzero(),
    "bincount": lambda values, mask: torch.bincount(values.long()),
    "repeat_interleave": lambda values, mask: torch.repeat_interleave(values.long()),
    "unique": lambda values, mask: values.unique(),
    "equal": lambda values, mask: torch.equal(values, values),
    "a tensor of a list": lambda values, mask: torch.tensor([1.0, 2.0], device=DEVICE),
    "a tensor of a number": lambda values, mask: torch.tensor(1.0, device=DEVICE),
    "a draw on the host": lambda values, mask: torch.rand(4).to(DEVICE, non_blocking=True),
    "a blocking copy": lambda values, mask: torch.rand(4).pin_memory().to(DEVICE),
    "a synchronisation": lambda values, mask: torch.cuda.synchronize(),
    "pageable batches": lambda values, mask: prefetched(pinned=False),
    "blocking batches": lambda values, mask: prefetched(non_blocking=False),
    "no record_stream": forgetful(Tensor, "record_stream"),
    "no wait_stream": forgetful(Stream, "wait_stream"),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
def test_a_planted_fault_is_caught(plant):
    with card() as fake:
        values = torch.empty(4, device=DEVICE)
        mask = values > 0
        assert not fake.waits
        with suppress(RuntimeError):  # without data, nobody knows how large a result is
            plant(values, mask)
    assert fake.waits
    assert not any(wait.said for wait in fake.waits)


def test_two_devices_do_not_mix():
    with card(), pytest.raises(RuntimeError, match=r"(?i)device"):
        torch.empty(4, device=DEVICE) + torch.empty(4)


def test_what_is_in_order_is_not_caught():
    with card() as fake:
        doubled = prefetched()
        torch.where(doubled > 0, doubled, 0.0).mean()
    assert not fake.waits
