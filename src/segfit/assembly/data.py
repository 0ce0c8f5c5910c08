"""Config → sources and batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig

from segfit.assembly.task import assembly_of, sample_bytes
from segfit.data.batches import DevicePrefetcher, EpochSampler, GatheringLoader, TrainBatches
from segfit.data.cache import cache_sources
from segfit.data.loader import Loader
from segfit.data.source import Source
from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.errors import SegFitError
from segfit.system.hardware import choose_workers
from segfit.system.process import launched


def cached_sources(
    config: DictConfig,
    sources: Mapping[str, Source],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Source], str | None]:
    """Return train and val as `data.cache` keeps them, for batches alone, and a line about it.

    `progress` is called with (done, total) images while they are decoded. Raises a SegFitError if an image cannot be
    read, or there is no room for them.
    """
    data, used = config.data, {split: sources[split] for split in ("train", "val")}
    assembly = assembly_of(config)
    forms = assembly.cached_forms(config, used) if data.cache != "none" else None
    if not forms:
        return used, None
    reading = repr(sorted(assembly.reading_options(config).items()))
    cached, line = cache_sources(forms, data, reading, progress)
    return dict(cached), line


def make_train_batches(
    config: DictConfig,
    source: Source,
    device: torch.device,
    workers: int,
    notice: Callable[[str], None] = lambda _: None,
    distributed: Distributed = SINGLE_PROCESS,
    weights: NDArray[np.float64] | None = None,
) -> TrainBatches:
    """Return the training batches of a config, read by `workers` processes.

    `notice` is called with samples that `data.on_bad_sample=skip` replaces; the processes of `distributed` share each
    batch of batch_size × their number; `weights` are the task's `sample_weights`. Raises a SegFitError if there are fewer images than processes.
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
        repeats=assembly.samples_per_read(config),
        weights=weights,
    )
    batches = batches_in_order(config, dataset, device, workers, notice, sampler)
    return TrainBatches(sampler, batches, source, config.limit_train_batches)


def batches_in_order(
    config: DictConfig,
    dataset: Any,
    device: torch.device,
    workers: int,
    notice: Callable[[str], None],
    order: EpochSampler | Sequence[int],
    *,
    share: bool = False,
) -> DevicePrefetcher:
    """Return samples of a dataset: training batches as a sampler draws them, or held-out batches of some indices.

    `share`: other processes have the other samples. `notice` is called with samples that `data.on_bad_sample=skip` leaves
    out or replaces.
    """
    loading, assembly = config.loader, assembly_of(config)
    batches: Any = order
    if not isinstance(order, EpochSampler):
        size = assembly.held_out_batch_size(config)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
    skip = notice if config.data.on_bad_sample == "skip" else None
    how = {key: loading[key] for key in ("prefetch", "pin_memory", "persistent")}
    how |= {"share": share, "batch_sampler": batches}
    loader = (
        GatheringLoader(dataset, device, batches)
        if getattr(dataset, "gathers", False)
        else Loader(dataset, assembly.collate, device, workers, skip, **how)
    )
    finish = dataset.decoder(device) if hasattr(dataset, "decoder") else None
    return DevicePrefetcher(loader, device, non_blocking=loading.non_blocking, finish=finish)


def workers_of(config: DictConfig, device: torch.device, *, cached: bool = False) -> int:
    """Return how many processes read images for a config on this machine; `cached`: by `cached_sources`.

    Processes that train together on a machine share its cores and its shared memory.
    """
    if config.loader.workers is not None:
        return int(config.loader.workers)
    assembly, sharing = assembly_of(config), launched().local_size
    workers = choose_workers(
        device_type=device.type,
        kept=cached and config.data.cache != "none" and not assembly.augments_in_workers(config),
        batch_bytes=sharing * config.batch_size * sample_bytes(config),
        prefetch=config.loader.prefetch,
    )
    return max(workers // sharing, 1) if workers else 0
