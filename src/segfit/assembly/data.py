"""Config → classes, sources and batches."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from omegaconf import DictConfig

from segfit.assembly.augmentation import make_cpu_augment
from segfit.config.check import plain, size_of
from segfit.data.bad_samples import Skipping
from segfit.data.batches import TrainBatches
from segfit.data.cache import CacheOptions, cache_sources
from segfit.data.loader import LoaderOptions, eval_loader, train_loader
from segfit.data.prefetch import DevicePrefetcher
from segfit.data.sampler import EpochSampler
from segfit.data.source import Source
from segfit.engine.distributed import ALONE, World
from segfit.errors import SegFitError
from segfit.system.cores import choose_workers
from segfit.system.torchrun_env import launched
from segfit.tasks.segmentation.classes import Classes
from segfit.tasks.segmentation.data.collate import collate
from segfit.tasks.segmentation.data.dataset import EvalDataset, LabelledSource, TrainDataset
from segfit.tasks.segmentation.data.fitted import fitted_sources
from segfit.tasks.segmentation.data.preflight import PreflightReport, check_sources

# Keys of data that no pixel of a sample depends on; files and names of images are told apart by themselves.
_NOT_READING = {
    "name", "fit", "mean", "std", "check", "on_bad_sample", "cache", "cache_dir", "class_colors", "background",
    "train_size", "val_size", "test_size", "root", "images", "split",
}  # fmt: skip


def make_classes(data: DictConfig) -> Classes:
    """Return the classes that a data config describes."""
    names = data.class_names or [f"class_{index}" for index in range(data.num_classes)]
    colors = tuple(tuple(color) for color in data.class_colors or [])
    return Classes(tuple(names), colors, data.background)


def make_sources(data: DictConfig) -> dict[str, LabelledSource]:
    """Return the splits of a data config: train, val and perhaps test.

    Raises:
        SegFitError: if the folder is not laid out as the config says.
    """
    classes = make_classes(data)
    if data.name == "shapes":
        from segfit.tasks.segmentation.data.shapes import shapes_sources

        shapes = shapes_sources(
            data.train_size, data.val_size, data.test_size, data.resolution, data.data_seed
        )
        for source in shapes.values():
            source.classes = classes
        return dict(shapes)
    from segfit.data.splits import SplitRule
    from segfit.tasks.segmentation.data.folder import folder_sources

    folders = folder_sources(
        data.root,
        classes=classes,
        images=data.images,
        masks=data.masks,
        mask_format=data.mask_format,
        ignore_index=data.ignore_index,
        label_map=plain(data.label_map) if data.label_map else None,
        image_mode=data.image_mode,
        intensity_window=tuple(data.window) if data.window is not None else None,
        split=SplitRule(**plain(data.split)),
    )
    return dict(folders)


def check_data(
    config: DictConfig,
    sources: Mapping[str, LabelledSource],
    progress: Callable[[int, int], None] | None = None,
) -> PreflightReport:
    """Check the splits of a config that is to be trained.

    Args:
        config: checked.
        sources: of `make_sources`.
        progress: called with (done, total) files.

    Raises:
        SegFitError: with every problem of the data set.
    """
    return check_sources(
        sources,
        check=config.data.check,
        skip=config.data.on_bad_sample == "skip",
        needs={"train": 1, "val": 1},
        progress=progress,
    )


def cached_sources(
    config: DictConfig,
    sources: Mapping[str, Source],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Source], str | None]:
    """Return train and val as `data.cache` keeps them, for batches alone, and a line about it.

    Args:
        config: checked.
        sources: as they are read.
        progress: called with (done, total) images while they are decoded.

    Raises:
        SegFitError: if an image cannot be read, or there is no room for them.
    """
    data, used = config.data, {split: sources[split] for split in ("train", "val")}
    if data.cache == "none":
        return used, None
    reading = {key: value for key, value in plain(data).items() if key not in _NOT_READING}
    options = CacheOptions(
        where=data.cache,
        reading=repr(sorted(reading.items())),
        label=Path(data.get("root") or data.name).expanduser().resolve().name,
        folder=Path(data.cache_dir) if data.cache_dir else None,
        skip=data.on_bad_sample == "skip",
    )
    fitted = fitted_sources(used, size_of(config.image_size), data.fit)
    cached, line = cache_sources(fitted, options, progress)
    return dict(cached), line


def make_train_batches(
    config: DictConfig,
    source: Source,
    device: torch.device,
    workers: int,
    notice: Callable[[str], None] = lambda _: None,
    world: World = ALONE,
) -> TrainBatches:
    """Return the training batches of a config.

    Args:
        config: checked.
        source: has the images.
        device: where batches go.
        workers: processes that read.
        notice: told of images that `data.on_bad_sample=skip` replaces.
        world: whose processes share each batch of batch_size × world size.

    Raises:
        SegFitError: if there are fewer images than processes.
    """
    if len(source) < world.size:
        raise SegFitError(
            f"{world.size} processes train together, but train has {len(source)} images, and each needs one at least. "
            f"Start fewer (--nproc_per_node)."
        )
    augment = make_cpu_augment(config)
    dataset = TrainDataset(source, size_of(config.image_size), config.data.fit, augment)
    sampler = EpochSampler(
        len(source), config.batch_size, config.seed, rank=world.rank, world_size=world.size
    )
    options = loader_options(config, workers)
    loader = train_loader(dataset, collate, sampler, device, options, make_skipping(config, notice))
    batches = DevicePrefetcher(loader, device, non_blocking=config.loader.non_blocking)
    return TrainBatches(sampler, batches, source, config.limit_train_batches)


def make_held_out_batches(
    config: DictConfig,
    source: Source,
    device: torch.device,
    workers: int,
    limit: int | None,
    notice: Callable[[str], None] = lambda _: None,
    world: World = ALONE,
) -> DevicePrefetcher:
    """Return a source's images in order, in batches of a config; of several processes, each one's share of them.

    Args:
        config: checked.
        source: has them.
        device: where batches go.
        workers: processes that read.
        limit: batches a pass at the most, if there is but one process; or None.
        notice: told of images that `data.on_bad_sample=skip` leaves out.
        world: whose processes share the images; none is seen twice.
    """
    loader = eval_loader(
        EvalDataset(source, size_of(config.image_size), config.data.fit),
        collate,
        held_out_batch_size(config),
        device,
        loader_options(config, workers),
        make_skipping(config, notice, share=world.size > 1),
        range(world.rank, held_out_images(config, source, limit), world.size),
    )
    return DevicePrefetcher(loader, device, non_blocking=config.loader.non_blocking)


def held_out_images(config: DictConfig, source: Source, limit: int | None) -> int:
    """Return how many of a source's images are held-out ones, if there are `limit` batches of them at the most."""
    return len(source) if limit is None else min(len(source), limit * held_out_batch_size(config))


def make_skipping(
    config: DictConfig, notice: Callable[[str], None], *, share: bool = False
) -> Skipping | None:
    """Return who is told of images that cannot be read, all or a process's share of them; None where they end the run."""
    return Skipping(notice, share=share) if config.data.on_bad_sample == "skip" else None


def loader_options(config: DictConfig, workers: int) -> LoaderOptions:
    """Return what a config says about loaders, with the workers that it came to."""
    loader = config.loader
    return LoaderOptions(workers, loader.prefetch, loader.pin_memory, loader.persistent)


def held_out_batch_size(config: DictConfig) -> int:
    """Return the images of a validation batch: whole images of any size one by one for sliding windows."""
    return 1 if config.data.fit == "crop" else int(config.batch_size)


def workers_of(config: DictConfig, device: torch.device, *, cached: bool = False) -> int:
    """Return how many processes read images for a config on this machine; `cached`: by `cached_sources`.

    Processes that train together on a machine share its cores and its shared memory.
    """
    height, width = size_of(config.image_size)
    sharing = launched().local_size
    workers = choose_workers(
        config.loader.workers,
        device_type=device.type,
        kept=cached and config.data.cache != "none" and config.augmentation.name != "cpu",
        batch_bytes=sharing * config.batch_size * 4 * height * width,
        prefetch=config.loader.prefetch,
    )
    return workers if config.loader.workers is not None else -(-workers // sharing)
