"""Config → the objects of a segmentation, as `TaskAssembly` asks for them: sources, datasets, model, loss, augmentation."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.config.check import plain
from segfit.data.source import Source
from segfit.errors import SegFitError
from segfit.models.build import IMAGENET, Normalisation, Weights, make_model, normalisation
from segfit.tasks.scored import ExtraMetric
from segfit.tasks.segmentation.augmentation import CpuAugment, Mix
from segfit.tasks.segmentation.classes import make_classes
from segfit.tasks.segmentation.data.dataset import (
    Augment,
    EvalDataset,
    FittedSource,
    LabelledSource,
    PredictDataset,
    TrainDataset,
    collate,
)
from segfit.tasks.segmentation.data.folder import folder_sources, make_reader, without_pixels
from segfit.tasks.segmentation.data.preflight import (
    PreflightReport,
    check_sources,
    class_pixels,
    unswapped,
)
from segfit.tasks.segmentation.data.schema import channels_of
from segfit.tasks.segmentation.inference import Ensemble, Predictor
from segfit.tasks.segmentation.losses import SegmentationLoss, balanced_weights
from segfit.tasks.segmentation.schema import is_weights, size_of
from segfit.tasks.segmentation.task import SegmentationTask

make_ensemble = Ensemble
__all__ = ["check_sources", "collate"]

# Keys of data that no pixel of a sample depends on; files and names of images are part of the key anyway.
_NOT_READING = {
    "name", "fit", "mean", "std", "check", "on_bad_sample", "cache", "cache_dir", "class_colors", "background",
    "train_size", "val_size", "decode", "test_size", "root", "images", "split", "sampling", "crops_per_image", "foreground",
}  # fmt: skip


def make_sources(config: DictConfig) -> Mapping[str, LabelledSource]:
    """Return train, val and perhaps test; raise a SegFitError if the folder is not laid out as the config says."""
    data, classes = config.data, make_classes(config.data)
    if data.name == "shapes":
        from segfit.data.shapes import shapes_sources

        return shapes_sources(data, classes)
    return folder_sources(data, classes)


def make_train_dataset(config: DictConfig, source: LabelledSource) -> TrainDataset:
    """Return a source's samples as they are trained on."""
    size = size_of(config.image_size)
    augment, data, encoded = make_augment(config, "cpu"), config.data, None
    if data.get("decode") == "gpu":
        encoded, source = source, without_pixels(source)
    return TrainDataset(source, size, data.fit, augment, data.foreground, data.background, encoded)


def samples_per_read(config: DictConfig) -> int:
    """Return how many crops of an image are trained on, one after the other."""
    return int(config.data.crops_per_image) if config.data.fit == "crop" else 1


def sample_weights(config: DictConfig, source: LabelledSource) -> NDArray[np.float64] | None:
    """Return the chance of each image, (N,), where every class comes as often (Shen et al., arXiv 1512.05830)."""
    if config.data.sampling == "uniform":
        return None
    present = class_pixels(source, skip=config.data.on_bad_sample == "skip") > 0
    chances: NDArray[np.float64] = (present / present.sum(0).clip(min=1)).sum(1)
    return chances if chances.any() else None


def make_held_out_dataset(config: DictConfig, source: LabelledSource) -> EvalDataset:
    """Return a source's samples as they are scored."""
    return EvalDataset(source, size_of(config.image_size), config.data.fit)


def make_predict_dataset(config: DictConfig, folder: str) -> PredictDataset:
    """Return the images of a folder, which have no masks; raise a SegFitError if there are none."""
    data, size = config.data, size_of(config.image_size)
    return PredictDataset(folder, size, data.fit, make_reader(data), data.get("slice_axis", 2))


def held_out_batch_size(config: DictConfig) -> int:
    """Return the images of a validation batch: whole images of any size one by one for sliding windows."""
    return 1 if config.data.fit == "crop" else int(config.batch_size)


def augments_in_workers(config: DictConfig) -> bool:
    """Say whether the data workers augment, and have work even where samples are cached."""
    return bool(config.augmentation.name == "cpu")


def cached_forms(
    config: DictConfig, sources: Mapping[str, LabelledSource]
) -> Mapping[str, tuple[Source, str]]:
    """Return what `data.cache` keeps of some splits, and what is done to its pairs.

    Images are fitted to one size already, and the masks of "train" with them; with "crop" all is kept as it is read.
    """
    (height, width), fit = size_of(config.image_size), config.data.fit
    forms: dict[str, tuple[Source, str]] = {}
    for split, source in sources.items():
        whole = split != "train"
        fitted = FittedSource(source, (height, width), fit, whole_masks=whole)
        kind = f"{width}x{height}-{fit}" + "-whole-masks" * whole
        forms[split] = (source, "original") if fit == "crop" else (fitted, kind)
    return forms


def reading_options(config: DictConfig) -> dict[str, Any]:
    """Return the options that the samples of `cached_form` depend on, besides the files."""
    return {key: value for key, value in plain(config.data).items() if key not in _NOT_READING}


def settle(config: DictConfig, earlier: Mapping[str, Any], notice: Callable[[str], None]) -> None:
    """Give data.mean and data.std, where they are null, those that the weights were made for, else ImageNet's.

    Raises a SegFitError if weights that were named cannot be had.
    """
    data = config.data
    known: Normalisation | None
    if earlier.get("data.mean"):
        name, known = config.init, (tuple(earlier["data.mean"]), tuple(earlier["data.std"]))
    else:
        name, known = normalisation(plain(config.model))
    given = None not in (data.mean, data.std)
    theirs = [_for_channels(values, config) for values in known or IMAGENET]
    data.mean, data.std = data.mean or theirs[0], data.std or theirs[1]
    if known and normalisation_of(config) != theirs:
        notice(
            f"data.mean={data.mean} data.std={data.std} stay as given, but {name} was pretrained with {theirs[0]} and "
            f"{theirs[1]}: leave both away to take those."
        )
    elif known and known != IMAGENET and not given:
        notice(f"data.mean={data.mean} data.std={data.std}: what {name} was pretrained with.")


def _for_channels(values: Sequence[float], config: DictConfig) -> list[float]:
    """Return what was meant for R, G and B for the channels of a config: their mean for another number of them."""
    count = channels_of(config)
    return list(values) if len(values) == count else [sum(values) / len(values)] * count


def normalisation_of(config: DictConfig) -> list[list[float]]:
    """Return mean and std of each channel in 0-1; ImageNet's where no training has settled them, to measure or plan."""
    return [
        plain(config.data)[key] or _for_channels(values, config)
        for key, values in zip(("mean", "std"), IMAGENET, strict=True)
    ]


def make_network(config: DictConfig, *, pretrained: bool) -> tuple[nn.Module, Weights]:
    """Return the model of a config, (B, C, H, W) → (B, num_classes, H, W), and which weights it has.

    Raises a SegFitError if weights that were named cannot be loaded.
    """
    names, options = make_classes(config.data).names, plain(config.model)
    return make_model(names, options, pretrained=pretrained, channels=channels_of(config))


def example_input(config: DictConfig, batch_size: int, device: torch.device) -> Tensor:
    """Return what the model gets of a training batch, (B, C, H, W) float32, in its memory format."""
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    shape = (batch_size, channels_of(config), *size_of(config.image_size))
    images = torch.zeros(shape, device=device)
    return images.contiguous(memory_format=layout)


def make_statistics(
    config: DictConfig, sources: Mapping[str, LabelledSource], report: PreflightReport
) -> dict[str, Any]:
    """Return what a task takes from the training data: the class weights of the loss, None where all are alike."""
    if (known := recorded_statistics(config, {})) is not None:
        return known
    pixels = report.class_pixels.get("train")
    if pixels is None:
        skip = config.data.on_bad_sample == "skip"
        pixels = class_pixels(sources["train"], sample=True, skip=skip).sum(0)
    return {"class_weights": balanced_weights(torch.from_numpy(pixels), config.loss.balance)}


def recorded_statistics(config: DictConfig, recorded: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return `make_statistics` as a run's metrics.json has it, or without a look at data; None where that is not possible.

    Raises a SegFitError if metrics.json holds something else.
    """
    weights, count = config.loss.class_weights, config.data.num_classes
    if weights == "balanced":
        weights = recorded.get("class_weights")
        if weights is None:
            return None
        if not is_weights(weights, count):
            raise SegFitError(f"class_weights must be {count} numbers of at least 0.")
    return {"class_weights": None if weights == "none" else list(map(float, weights))}


def make_task(
    config: DictConfig,
    device: torch.device,
    statistics: Mapping[str, Any] | None = None,
    **shared: Any,
) -> SegmentationTask:
    """Return what a batch means under a config, on a device; `shared` are fields of `ScoredTask`."""
    mean, std = normalisation_of(config)
    weights = (statistics or {}).get("class_weights")
    return SegmentationTask(
        classes=make_classes(config.data),
        criterion=SegmentationLoss(config.loss, config.data.num_classes, weights).to(device),
        mean=torch.tensor(mean, device=device).view(-1, 1, 1),
        std=torch.tensor(std, device=device).view(-1, 1, 1),
        augment=make_augment(config, "kornia-gpu"),
        mix=make_mix(config),
        predictor=make_predictor(config),
        channels_last=config.channels_last,
        **shared,
    )


def make_extra_metrics(config: DictConfig) -> list[ExtraMetric]:
    """Return the metrics of `metrics.extra`, each of which has scored an example; raise a SegFitError with all problems."""
    if not config.metrics.extra:
        return []
    from segfit.tasks.segmentation.metrics import extra_metrics  # torchmetrics takes seconds

    return extra_metrics(plain(config.metrics.extra), make_classes(config.data))


def make_predictor(config: DictConfig, *, overlap: float = 0.5, flip: bool = False) -> Predictor:
    """Return how images become logits: whole, or in windows of image_size, batch_size of them at once."""
    window = size_of(config.image_size) if config.data.fit == "crop" else None
    swap = plain(config.augmentation)["swap"] or ()
    return Predictor(window, overlap, flip, swap, config.batch_size)


def make_augment(config: DictConfig, name: str) -> Augment | None:
    """Return what workers ("cpu") do to each sample or the device ("kornia-gpu") to each batch, if the config says so."""
    if config.augmentation.name != name:
        return None
    options = {**plain(config.augmentation), "fill": normalisation_of(config)[0]}
    if name == "cpu":
        import_module("torchvision.transforms.v2")  # takes a second: once, before there are workers
        return CpuAugment(**options)
    from segfit.tasks.segmentation.kornia_gpu import KorniaGpu  # kornia takes a second

    return KorniaGpu(**options)


def make_mix(config: DictConfig) -> Augment | None:
    """Return MixUp and CutMix with the config's probabilities, or None if both are 0."""
    options = config.augmentation
    if options.name == "none" or options.mixup + options.cutmix == 0:
        return None
    return Mix(num_classes=config.data.num_classes, **plain(options))


def apply_options(config: DictConfig, options: DictConfig, notice: Callable[[str], None]) -> None:
    """Change in a run's config what the options of evaluate.py say about the task."""
    config.augmentation.name = "none"
    if options.flip and (sides := unswapped(config)):
        notice(f"flip=true averages classes with each other. {sides} in training, or leave it out.")
    if options.sliding_window:
        config.data.fit = "crop"
    threshold, count = options.threshold, config.data.num_classes
    if threshold is not None and count != 2:
        raise SegFitError(f"threshold={threshold}: is for two classes, and the run has {count}.")


def facts(config: DictConfig, _: Any) -> dict[str, str]:
    """Return what really runs, label → text, that only this task knows."""
    return {
        "classes": str(config.data.num_classes),
        "fit": config.data.fit,
        "augmentation": config.augmentation.name,
    }
