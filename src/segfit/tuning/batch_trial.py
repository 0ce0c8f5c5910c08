"""One trial of a batch: train and validate with it, and return what it took."""

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from segfit.assembly.data import batches_in_order
from segfit.assembly.task import assembly_of, planning_of
from segfit.assembly.training import make_training
from segfit.engine.evaluate import evaluate
from segfit.system.cards import GIB
from segfit.system.hardware import resolve_device
from segfit.tuning.change import changed, thawed
from segfit.tuning.measure import recorded_peak, train_speed


def trial_config(config: DictConfig, batch: int) -> DictConfig:
    """Return the config of a trial of a micro-batch: whatever may cost memory in some batch does so in this one."""
    options = {
        "batch_size": batch,
        "loader.workers": 0,  # one batch is enough
        "data.check": "off",  # the parent has checked
        "init": None,
        "data.cache": "none",
        "report.panels": 0,
    }
    return changed(thawed(planning_of(config).costliest(config)), options)


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

    Of `budget_gb` GiB (None: what is free on the card) a share of `margin` is kept free. A round trains for `seconds`, but
    at least one update without and three with the optimizer's state, and validates on the held-out images `largest`.

    Returns:
        "device": "cpu" or "cuda"; "peak_bytes": of tensors that torch allocated; "limit_bytes";
        "samples_per_second": of training, whatever it took to load the batch left out.

    Raises:
        RuntimeError, MemoryError: as `is_out_of_memory` knows them.
        SegFitError: if the training cannot be built.
    """
    device, _ = resolve_device(config.device)
    room = budget_gb * GIB if budget_gb is not None else math.inf
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)  # what contexts and other processes leave
        room = min(room, free)
        torch.cuda.set_per_process_memory_fraction(room * (1 - margin) / total, device)
    with recorded_peak(device) as peak, tempfile.TemporaryDirectory() as folder:
        training = make_training(config, Path(folder), lambda _: None)
        fit = training.fit
        assembly = assembly_of(config)
        indices = largest[: assembly.held_out_batch_size(config)]
        source = assembly.make_sources(config)["val"]
        dataset = assembly.make_held_out_dataset(config, source)
        held_out = batches_in_order(config, dataset, device, 0, lambda _: None, indices)

        def validate() -> None:
            evaluate(fit.state.evaluated(), fit.task, held_out, fit.state.precision)

        if device.type == "cuda":
            validate()  # cuDNN tries its algorithms once, with more memory than it takes to use them
        for _ in range(rounds):
            speed = train_speed(training, seconds=seconds, warmup=1, resident=True)
            validate()
    return {
        "device": device.type,
        "peak_bytes": peak.bytes,
        "limit_bytes": int(room * (1 - margin)),
        "samples_per_second": speed.samples_per_second,
    }
