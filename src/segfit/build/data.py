"""Config → classes, sources and batches."""

import torch
from omegaconf import DictConfig

from segfit.build.augmentation import make_cpu_augment
from segfit.check import plain, size_of
from segfit.data.batches import HeldOutBatches, TrainBatches
from segfit.data.cores import choose_workers
from segfit.data.dataset import EvalDataset, TrainDataset
from segfit.data.loader import eval_loader, train_loader
from segfit.data.prefetch import DevicePrefetcher
from segfit.data.sampler import EpochSampler
from segfit.data.source import Source
from segfit.labels import Classes


def make_classes(data: DictConfig) -> Classes:
    """Return the classes that a data config describes."""
    names = data.class_names or [f"class_{index}" for index in range(data.num_classes)]
    colors = tuple(tuple(color) for color in data.class_colors or [])
    return Classes(tuple(names), colors, data.background)


def make_sources(data: DictConfig) -> dict[str, Source]:
    """Return the splits of a data config: train, val and perhaps test.

    Raises:
        SegFitError: if the folder is not laid out as the config says.
    """
    classes = make_classes(data)
    if data.name == "shapes":
        from segfit.data.shapes import shapes_sources

        shapes = shapes_sources(
            data.train_size, data.val_size, data.test_size, data.resolution, data.data_seed
        )
        for source in shapes.values():
            source.classes = classes
        return dict(shapes)
    from segfit.data.folder import folder_sources
    from segfit.data.splits import SplitRule

    folders = folder_sources(
        data.root,
        classes=classes,
        images=data.images,
        masks=data.masks,
        mask_format=data.mask_format,
        ignore_index=data.ignore_index,
        label_map=plain(data.label_map) if data.label_map else None,
        image_mode=data.image_mode,
        window=tuple(data.window) if data.window is not None else None,
        split=SplitRule(**plain(data.split)),
    )
    return dict(folders)


def make_train_batches(
    config: DictConfig, source: Source, device: torch.device, workers: int
) -> TrainBatches:
    """Return the training batches of a config."""
    augment = make_cpu_augment(config)
    dataset = TrainDataset(source, size_of(config.image_size), config.data.fit, augment)
    sampler = EpochSampler(len(source), config.batch_size, config.seed)
    loader = train_loader(
        dataset,
        sampler,
        device=device,
        workers=workers,
        prefetch=config.loader.prefetch,
        pin_memory=config.loader.pin_memory,
        persistent=config.loader.persistent,
    )
    return TrainBatches(sampler, DevicePrefetcher(loader, device), config.limit_train_batches)


def make_held_out_batches(
    config: DictConfig, source: Source, device: torch.device, workers: int, limit: int | None
) -> HeldOutBatches:
    """Return a source's images in order, in batches of a config."""
    loader = eval_loader(
        EvalDataset(source, size_of(config.image_size), config.data.fit),
        held_out_batch_size(config),
        device=device,
        workers=workers,
        prefetch=config.loader.prefetch,
        pin_memory=config.loader.pin_memory,
        persistent=config.loader.persistent,
    )
    return HeldOutBatches(DevicePrefetcher(loader, device), len(loader), limit)


def held_out_batch_size(config: DictConfig) -> int:
    """Return the images of a validation batch: whole images of any size one by one for sliding windows."""
    return 1 if config.data.fit == "crop" else int(config.batch_size)


def workers_of(config: DictConfig, device: torch.device) -> int:
    """Return how many processes read images for a config on this machine."""
    height, width = size_of(config.image_size)
    return choose_workers(
        config.loader.workers,
        device_type=device.type,
        batch_bytes=config.batch_size * 4 * height * width,
        prefetch=config.loader.prefetch,
    )
