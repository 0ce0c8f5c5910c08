"""Config → the objects of a restoration, as `TaskAssembly` asks for them: sources, datasets, model, loss, scores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.config.check import plain
from segfit.data.shapes import shapes_sources
from segfit.data.source import Arrays, Source, SourceView
from segfit.data.splits import SPLITS, find_splits
from segfit.engine.precision import resolve_precision
from segfit.models.build import Weights
from segfit.models.restorers import make_restorer
from segfit.tasks.restoration.data.dataset import HeldOutDataset, PredictDataset, TrainDataset
from segfit.tasks.restoration.data.folder import check_sources, folder_sources
from segfit.tasks.restoration.degradations import Degradation
from segfit.tasks.restoration.losses import RestorationLoss
from segfit.tasks.restoration.schema import channels_of
from segfit.tasks.restoration.task import RestorationTask
from segfit.tasks.scored import ExtraMetric, checked_metrics

__all__ = ["check_sources"]

_SCORES = ("loss", "psnr", "ssim", "lpips", "psnr_gain", "ssim_gain", "lpips_gain")
_SMALLEST = 11  # pixels a side, of SSIM's window


class Drawn(SourceView):
    """A `Source` of the built-in phantoms as clean pictures, in RGB or grey."""

    def __init__(self, source: Source, channels: int) -> None:
        super().__init__(source)
        self.channels = channels

    def read(self, index: int) -> Arrays:
        """Return the picture (H, W, C) uint8; its green channel where C is 1."""
        picture = self.source.read(index)[0]
        return (picture if self.channels == 3 else picture[..., 1:2].copy(),)


def make_sources(config: DictConfig) -> dict[str, Source]:
    """Return the splits of a config; raise a SegFitError if the folder is not laid out as the config says."""
    data = config.data
    if data.name == "shapes":
        drawn = shapes_sources(data).items()
        return {split: Drawn(source, channels_of(config)) for split, source in drawn}
    smallest = dict.fromkeys(SPLITS, _SMALLEST + 2 * config.metrics.crop_border)
    return dict(folder_sources(data, {**smallest, "train": config.patch_size}))


def make_train_dataset(config: DictConfig, source: Source) -> TrainDataset:
    """Return a source's patches."""
    return TrainDataset(source, config.patch_size)


def samples_per_read(config: DictConfig) -> int:
    """Return the patches that are cut each time that a picture is decoded."""
    return int(config.data.patches)


def make_held_out_dataset(config: DictConfig, source: Source) -> HeldOutDataset:
    """Return a source's pictures as they are scored."""
    return HeldOutDataset(source, Degradation(plain(config.degrade)).held_out)


def make_predict_dataset(config: DictConfig, folder: str) -> PredictDataset:
    """Return the degraded pictures of a folder; raise a SegFitError if there are none."""
    return PredictDataset(folder, config.data.image_mode)


def held_out_batch_size(_: DictConfig) -> int:
    """Return one: pictures are of any size."""
    return 1


def reading_options(config: DictConfig) -> dict[str, Any]:
    """Return the options that the samples depend on, besides the files."""
    keys = ("image_mode", "resolution", "data_seed")
    return {key: config.data[key] for key in keys if key in config.data}


def make_network(config: DictConfig, *, pretrained: bool) -> tuple[nn.Module, Weights]:  # noqa: ARG001
    """Return the model of a config, (B, C, H, W) → the same, and which weights it has."""
    return make_restorer(channels_of(config), plain(config.model)), Weights()


def example_input(config: DictConfig, batch_size: int, device: torch.device) -> Tensor:
    """Return what the model gets of a training batch, (B, C, P, P) float32, in its memory format."""
    side = config.patch_size
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    patches = torch.zeros(batch_size, channels_of(config), side, side, device=device)
    return patches.contiguous(memory_format=layout)


def make_task(config: DictConfig, device: torch.device, *_: Any, **shared: Any) -> RestorationTask:
    """Return what a batch means under a config, on a device; `shared` are fields of `ScoredTask`.

    Raises a SegFitError if the weights of the perceptual loss or of LPIPS cannot be had.
    """
    precision = resolve_precision(config.precision.name, device)[0]
    return RestorationTask(
        criterion=RestorationLoss(config.loss, precision).to(device),
        degrade=Degradation(plain(config.degrade)).to(device),
        scores=config.metrics,
        tile=config.tile,
        tiles_at_once=max(1, config.batch_size * config.patch_size**2 // config.tile**2),
        device=device,
        channels_last=config.channels_last,
        **shared,
    )


def make_extra_metrics(config: DictConfig) -> list[ExtraMetric]:
    """Return the metrics of `metrics.extra`, each of which has scored an example; raise a SegFitError with all problems."""
    shape = (2, 1, channels_of(config), 64, 64)
    pair = torch.rand(shape, generator=torch.Generator().manual_seed(0))  # restored, target
    extra, filled = plain(config.metrics)["extra"], {"data_range": 1.0}
    return checked_metrics(extra, ("image",), _SCORES, lambda _: tuple(pair), filled)


def apply_options(config: DictConfig, options: DictConfig, notice: Callable[[str], None]) -> None:
    """Change in a run's config what the options of evaluate.py say about the task."""
    for key, value in options.metrics.items():
        if value is not None:
            config.metrics[key] = value
    config.tile = options.tile or config.tile
    if options.images is not None:  # nothing is scored, so nothing has to be had for it
        config.loss.perceptual, config.metrics.lpips = 0.0, None
    if options.batch_size not in (None, 1):
        notice(f"batch_size={options.batch_size}: whole pictures are taken one by one.")
    if options.root is not None and options.split == "test":
        root = Path(options.root).expanduser()
        named = any((root / config.data[split]).is_dir() for split in SPLITS)
        if not named and "" in find_splits(root, ["."])[0]:
            config.data.test = "."  # a test set has no folders for splits


def degraded_by(config: DictConfig) -> str:
    """Return how a config's pictures are degraded: "noise sigma=25.0"."""
    if config.data.name == "pairs":
        return "given pairs"
    options = plain(config.degrade)
    return " ".join([options.pop("name"), *(f"{key}={one}" for key, one in options.items())])


def loss_label(config: DictConfig) -> str:
    """Return what a config's loss is called: "charbonnier + 0.1 × vgg16"."""
    loss = config.loss
    if not loss.perceptual:
        return str(loss.name)
    random = "" if loss.weights is not None else " with RANDOM features"
    return f"{loss.name} + {loss.perceptual:g} × {loss.encoder}{random}"


def facts(config: DictConfig, _: Any) -> dict[str, str]:
    """Return what really runs, label → text, that only this task knows."""
    scores = config.metrics
    colours = "grey" if channels_of(config) == 1 else {"rgb": "RGB", "y": "Y"}[scores.channels]
    rounded = "rounded to 8 bits" if scores.rounded else "not rounded"
    return {
        "degraded by": degraded_by(config),
        "patches": f"{config.data.patches} of a picture",
        "loss": loss_label(config),
        "scores": f"on {colours}, {scores.crop_border} pixels cropped, {rounded}",
    }
