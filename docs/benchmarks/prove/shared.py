"""What stages share: configs, trainings, commands."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from segfit.assembly.training import Training, make_training
from segfit.cli import main as cli
from segfit.system.cards import visible_gpus

ROOT = Path(__file__).parents[3]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GIB = 2**30

PLAIN = ("data=shapes", "augmentation=none", "loader.workers=0", "accumulate=1", "data.cache=none")
TOY = (
    "data.train_size=8", "data.val_size=2", "data.test_size=1", "data.resolution=64", "image_size=64",
    "batch_size=2", "epochs=1",
)  # fmt: skip
EVERYTHING = (
    "augmentation=kornia-gpu", "augmentation.affine=0.7", "augmentation.color_jitter=0.7", "augmentation.blur=0.7",
    "augmentation.noise=0.7", "augmentation.mixup=0.5", "augmentation.cutmix=0.5", "ema_decay=0.99", "accumulate=2",
    "clip_grad_norm=1.0",
)  # fmt: skip


def named(model: str, toy: bool) -> list[str]:
    """Return the options of a model with random weights."""
    small = {"cnn": ["model.base_channels=8"], "timm_unet": ["model.encoder=resnet18"]}
    random = [] if model == "cnn" else ["model.weights=null"]
    return [
        f"model={model}",
        *random,
        *(small.get(model, []) if toy or model == "timm_unet" else []),
    ]


def composed(*overrides: str, toy: bool, base: tuple[str, ...] = PLAIN) -> DictConfig:
    """Compose what train.py would; of equal keys the last one counts."""
    lines = [*base, *(TOY if toy else ()), *overrides]
    last = list({text.split("=")[0]: text for text in lines}.values())
    with mock.patch.object(sys, "argv", ["train.py", *last]):
        cli.setup()
        arguments = sys.argv[1:]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", arguments)


def training(config: DictConfig) -> Training:
    """Return a training that is ready to run."""
    return make_training(config, Path(tempfile.mkdtemp()), lambda _: None)


def called(
    script: str,
    *overrides: str,
    toy: bool = False,
    torchrun: int = 0,
    base: tuple[str, ...] = PLAIN,
) -> tuple[Path, str]:
    """Run an entry point, or another script with a word; return its run folder and what it printed.

    Raises RuntimeError with its errors.
    """
    folder = Path(tempfile.mkdtemp())
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}"]
    lines = {text.split("=")[0]: text for text in (*base, *(TOY if toy else ()), *overrides)}
    place = [f"hydra.run.dir={folder}"] if base else []  # a run that is resumed has its folder
    words = [*launch * (torchrun > 0), *str(ROOT / script).split(), *lines.values(), *place]
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-700:] + done.stderr[-700:])
    return folder, done.stdout


def read(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text())


def used() -> float:
    """Return the GiB of the card that all processes use, by NVML; without a card, of the host that this one does."""
    import psutil

    if DEVICE.type == "cpu":
        return float(psutil.Process().memory_info().rss) / GIB
    gpu = visible_gpus()[0]
    return gpu.total_gib - gpu.free_gib()


BEFORE = used()


def taken() -> float:
    """Return the GiB that this process has taken of the card since it began, context included, if no other does."""
    return used() - BEFORE
