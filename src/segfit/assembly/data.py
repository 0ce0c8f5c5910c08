"""Config → sources and batches."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from omegaconf import DictConfig

from segfit.assembly.task import Preflight, assembly_of
from segfit.data.bad_samples import Skipping
from segfit.data.batches import TrainBatches
from segfit.data.cache import CacheOptions, cache_sources
from segfit.data.loader import Loader, LoaderOptions
from segfit.data.prefetch import DevicePrefetcher
from segfit.data.sampler import EpochSampler
from segfit.data.source import Source
from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.errors import SegFitError
from segfit.system.cores import choose_workers
from segfit.system.torchrun_env import launched


def check_data(
    config: DictConfig,
    sources: Mapping[str, Source],
    progress: Callable[[int, int], None] | None = None,
) -> Preflight:
    """Check the splits of a config that is to be trained.

    Args:
        config: checked.
        sources: of `make_sources`.
        progress: called with (done, total) files.

    Raises:
        SegFitError: with every problem of the data set.
    """
    return assembly_of(config).check_sources(config, sources, {"train": 1, "val": 1}, progress)


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
    assembly = assembly_of(config)
    reading = assembly.reading_options(config)
    options = CacheOptions(
        where=data.cache,
        reading=repr(sorted(reading.items())),
        label=Path(data.get("root") or data.name).expanduser().resolve().name,
        folder=Path(data.cache_dir) if data.cache_dir else None,
        skip=data.on_bad_sample == "skip",
    )
    cached, line = cache_sources(assembly.cached_forms(config, used), options, progress)
    return dict(cached), line


def make_train_batches(
    config: DictConfig,
    source: Source,
    device: torch.device,
    workers: int,
    notice: Callable[[str], None] = lambda _: None,
    distributed: Distributed = SINGLE_PROCESS,
) -> TrainBatches:
    """Return the training batches of a config.

    Args:
        config: checked.
        source: has the images.
        device: where batches go.
        workers: processes that read.
        notice: called with samples that `data.on_bad_sample=skip` replaces.
        distributed: whose processes share each batch of batch_size × their number.

    Raises:
        SegFitError: if there are fewer images than processes.
    """
    if len(source) < distributed.size:
        raise SegFitError(
            f"{distributed.size} processes train together, but train has {len(source)} images, and each needs one at least. "
            f"Start fewer (--nproc_per_node)."
        )
    assembly = assembly_of(config)
    dataset = assembly.make_train_dataset(config, source)
    sampler = EpochSampler(
        len(source),
        config.batch_size,
        config.seed,
        rank=distributed.rank,
        world_size=distributed.size,
    )
    options = loader_options(config, workers)
    loader = Loader(
        dataset,
        assembly.collate,
        device,
        options,
        make_skipping(config, notice),
        batch_sampler=sampler,
    )
    batches = DevicePrefetcher(loader, device, non_blocking=config.loader.non_blocking)
    return TrainBatches(sampler, batches, source, config.limit_train_batches)


def make_held_out_batches(
    config: DictConfig,
    source: Source,
    device: torch.device,
    workers: int,
    limit: int | None,
    notice: Callable[[str], None] = lambda _: None,
    distributed: Distributed = SINGLE_PROCESS,
    indices: Sequence[int] | None = None,
) -> DevicePrefetcher:
    """Return a source's images in order, in batches of a config; of several processes, each one's share of them.

    Args:
        config: checked.
        source: has them.
        device: where batches go.
        workers: processes that read.
        limit: batches a pass at the most, if there is but one process; or None.
        notice: called with samples that `data.on_bad_sample=skip` leaves out.
        distributed: whose processes share the images; none is seen twice.
        indices: of these images alone, whatever `limit` and `distributed` are; or None.
    """
    assembly = assembly_of(config)
    if indices is None:
        indices = range(distributed.rank, held_out_samples(config, source, limit), distributed.size)
    loader = Loader(
        assembly.make_held_out_dataset(config, source),
        assembly.collate,
        device,
        loader_options(config, workers),
        make_skipping(config, notice, share=distributed.size > 1),
        batch_size=assembly.held_out_batch_size(config),
        sampler=indices,
    )
    return DevicePrefetcher(loader, device, non_blocking=config.loader.non_blocking)


def held_out_samples(config: DictConfig, source: Source, limit: int | None) -> int:
    """Return how many of a source's images are held-out ones, if there are `limit` batches of them at the most."""
    return (
        len(source)
        if limit is None
        else min(len(source), limit * assembly_of(config).held_out_batch_size(config))
    )


def make_skipping(
    config: DictConfig, notice: Callable[[str], None], *, share: bool = False
) -> Skipping | None:
    """Return what logs samples that cannot be read, all or a process's share of them; None if they end the run."""
    return Skipping(notice, share=share) if config.data.on_bad_sample == "skip" else None


def loader_options(config: DictConfig, workers: int) -> LoaderOptions:
    """Return what a config says about loaders, with the workers that it came to."""
    loader = config.loader
    return LoaderOptions(workers, loader.prefetch, loader.pin_memory, loader.persistent)


def workers_of(config: DictConfig, device: torch.device, *, cached: bool = False) -> int:
    """Return how many processes read images for a config on this machine; `cached`: by `cached_sources`.

    Processes that train together on a machine share its cores and its shared memory.
    """
    assembly = assembly_of(config)
    sharing = launched().local_size
    workers = choose_workers(
        config.loader.workers,
        device_type=device.type,
        kept=cached and config.data.cache != "none" and not assembly.augments_in_workers(config),
        batch_bytes=sharing * assembly.batch_bytes(config),
        prefetch=config.loader.prefetch,
    )
    return workers if config.loader.workers is not None else -(-workers // sharing)
