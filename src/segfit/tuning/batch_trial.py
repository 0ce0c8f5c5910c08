"""One trial of a batch: train and validate with it, and tell what it took."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly.data import make_held_out_batches
from segfit.assembly.task import assembly_of
from segfit.assembly.training import make_training
from segfit.data.images import open_image
from segfit.data.source import Arrays, Source
from segfit.engine.evaluate import evaluate
from segfit.errors import SegFitError
from segfit.system.hardware import GIB, resolve_device
from segfit.tuning.allocations import recorded_peak
from segfit.tuning.measure import train_speed


def by_size(source: Source) -> list[int]:
    """Return the indices of a source's images, those with most pixels first, read from the files' headers."""
    return sorted(range(len(source)), key=lambda index: _pixels(source, index), reverse=True)


def _pixels(source: Source, index: int) -> int:
    files = source.files(index)
    if not files:
        return 0  # synthetic images are all of one size
    try:
        with open_image(files[0]) as image:
            return image.width * image.height
    except SegFitError:
        return 0  # possible with data.check=off; whoever reads the image will tell


def trial_config(config: DictConfig, batch: int) -> DictConfig:
    """Return the config of a trial: whatever may cost memory in some batch does so in this one.

    Args:
        config: checked.
        batch: images a micro-batch.
    """
    config = config.copy()
    config.batch_size = batch
    config.loader.workers = 0  # one batch is enough
    config.data.check = "off"  # the parent has checked
    config.data.cache = "none"
    config.report.panels = 0
    if "weights" in config.model:
        config.model.weights = None  # random ones take the same memory, and no download
    if config.loss.class_weights == "balanced":
        config.loss.class_weights = [1.0] * config.data.num_classes  # no counting of pixels
    augmentation = config.augmentation
    for chance in ("hflip", "vflip", "affine", "color_jitter", "blur", "noise"):
        augmentation[chance] = 1.0 if augmentation[chance] > 0 else 0.0
    if augmentation.mixup + augmentation.cutmix > 0:
        augmentation.mixup, augmentation.cutmix = 1.0, 0.0  # soft targets, which either makes
    return config


class Selection:
    """Some images of a source, in the order of their indices.

    Args:
        source: has them.
        indices: in it.
    """

    def __init__(self, source: Source, indices: list[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def id(self, index: int) -> str:
        """Return the image's name."""
        return self.source.id(self.indices[index])

    def files(self, index: int) -> list[Path]:
        """Return the image's files."""
        return self.source.files(self.indices[index])

    def read(self, index: int) -> Arrays:
        """Return the source's arrays."""
        return self.source.read(self.indices[index])


def fits(
    config: DictConfig,
    *,
    budget_gb: float | None,
    margin: float,
    rounds: int,
    seconds: float,
    largest: list[int],
) -> dict[str, Any]:
    """Train and validate with a config's batch; on CUDA nothing past the limit can be allocated.

    Args:
        config: of `trial_config`.
        budget_gb: GiB that may be used; None: what is free on the card. Required on the CPU.
        margin: share (0-1) of it that is kept free.
        rounds: of training, then validation.
        seconds: that a round trains, but at least one update without and three with the optimizer's state.
        largest: held-out images to validate on.

    Returns:
        "device": "cpu" or "cuda"; "peak_bytes": of tensors that torch allocated; "limit_bytes";
        "samples_per_second": of training, whatever it took to load the batch left out.

    Raises:
        RuntimeError, MemoryError: as `is_out_of_memory` knows them.
        SegFitError: if the training cannot be built.
    """
    device, _ = resolve_device(config.device)
    limit = _limit(device, budget_gb, margin)
    with recorded_peak(device) as peak, tempfile.TemporaryDirectory() as folder:
        training = make_training(config, Path(folder), _ignore)
        fit = training.fit
        source = Selection(assembly_of(config).make_sources(config)["val"], largest)
        held_out = make_held_out_batches(config, source, device, 0, 1)
        for _ in range(rounds):
            speed = train_speed(training, seconds=seconds, warmup=1, resident=True)
            evaluate(fit.state.evaluated(), fit.task, held_out, fit.state.precision)
    return {
        "device": device.type,
        "peak_bytes": peak.bytes,
        "limit_bytes": limit,
        "samples_per_second": speed.samples_per_second,
    }


def _limit(device: torch.device, budget_gb: float | None, margin: float) -> int:
    """Return how many bytes may be allocated, and hold torch to it on CUDA."""
    room = budget_gb * GIB if budget_gb is not None else float("inf")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)  # what contexts and other processes leave
        room = min(room, free)
        torch.cuda.set_per_process_memory_fraction(room * (1 - margin) / total, device)
    return int(room * (1 - margin))


def _ignore(_message: str) -> None:
    """What falls back in a trial falls back in the training, which will tell."""
