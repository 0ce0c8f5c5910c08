"""Config → device, precision, model and optimizer."""

import re

import torch
from omegaconf import DictConfig
from torch import nn

from segfit.assembly.earlier import Notice, Start, start_from
from segfit.assembly.task import assembly_of
from segfit.config.check import flat, plain
from segfit.config.schema import OptimizerConfig
from segfit.config.tasks import schema_of
from segfit.data.source import some
from segfit.engine.compiling import HalfWeights, compiled_or_eager
from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.optim import make_optimizer, make_scheduler
from segfit.engine.precision import Precision, resolve_precision, set_tf32
from segfit.engine.state import TrainingState
from segfit.errors import SegFitError, raise_all
from segfit.system.hardware import keep_freed_memory, resolve_device


def make_device(
    config: DictConfig, requested: str, notice: Notice
) -> tuple[torch.device, Precision]:
    """Return the device and the precision that really run for `requested`; a fallback is logged."""
    device, cpu_instead = resolve_device(requested)
    if device.type == "mps" and schema_of(config.task.name).FLOAT64:
        device, lacking = torch.device("cpu"), "float64, in which this task sums its scores"
        cpu_instead = f"device={requested}: Apple's GPUs lack {lacking}; running on the CPU."
    chosen, other_instead = resolve_precision(config.precision.name, device)
    for fallback in filter(None, (cpu_instead, other_instead)):
        notice(fallback)
    if device.type == "cuda":
        set_tf32(config.precision.tf32)
    else:
        keep_freed_memory()
    return device, chosen


def make_state(
    config: DictConfig,
    device: torch.device,
    precision: Precision,
    updates_per_epoch: int,
    notice: Notice,
    resumed: bool = False,
    start: Start | None = None,
    distributed: Distributed = SINGLE_PROCESS,
) -> tuple[TrainingState, str]:
    """Return model, optimizer, scheduler and scaler of a config, and where the weights come from.

    `updates_per_epoch` is for the schedule; if `resumed`, the weights will be loaded from a checkpoint; `start` is what
    `init` names. Every process of `distributed` has to call. Raises a SegFitError if weights that were named cannot be loaded or do not fit, `freeze` names nothing or
    everything, or the optimizer does not take its options.
    """
    if config.hardware.vram_gb is not None and device.type == "cpu":
        notice(f"hardware={config.hardware.name}: no CUDA card here; running on the CPU.")
    assembly = assembly_of(config)
    model, weights = assembly.make_network(config, pretrained=not resumed and start is None)
    source = "from the checkpoint" if resumed else weights.source
    if weights.warning and not resumed:
        notice(weights.warning)
    random = list(model.state_dict()) if source == "random" else []
    if start is not None:
        random = start_from(model, start, flat(plain(config)), notice)
        source = str(start.path)
    model = to_device(model, device, config.channels_last)
    ema = None
    if config.ema_decay is not None:
        from timm.utils import ModelEmaV3

        ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
    optimizer = make_optimizer(model, lr=config.lr, **plain(config.optimizer))
    if not resumed:
        _refuse_unused(config.optimizer, model)
    scheduler = make_scheduler(
        optimizer,
        updates_per_epoch=updates_per_epoch,
        epochs=config.epochs,
        **plain(config.scheduler),
    )
    scaler = precision.scaler(config.precision.init_scale, config.precision.growth_interval)
    state = TrainingState(model, model, optimizer, scheduler, scaler, ema, precision, device)
    if config.freeze is not None:
        state.frozen, state.frozen_epochs = frozen(model, config.freeze), config.freeze_epochs
        state.train()
        held = {id(parameter) for parameter in state.frozen}
        if lost := [n for n, p in model.named_parameters() if n in random and id(p) in held]:
            notice(f"freeze={config.freeze}: {some(lost)} are random, and what is frozen stays so.")
    state.distributed = distributed
    if config.compile:
        example, mode = assembly.example_input(config, config.batch_size, device), None
        if config.compile_mode != "default":
            if device.type == "cuda" and config.accumulate == distributed.size == 1:
                mode = config.compile_mode
            else:
                notice(
                    f"compile_mode={config.compile_mode}: CUDA graphs need a CUDA card, one process and accumulate=1; compiled "
                    f"without them."
                )
        state.forward, reason = compiled_or_eager(model, example, precision, distributed, mode)
        state.graphs = mode is not None and reason is None
        if reason:
            notice(reason)
    elif device.type == "cuda" and precision.name != "fp32" and distributed.size == 1:
        # Several processes exchange gradients while others are computed; these come all at once.
        state.forward = HalfWeights(model)
    else:
        state.forward = distributed.wrap(model)
    return state, source


def frozen(model: nn.Module, pattern: str) -> list[nn.Parameter]:
    """Return the parameters whose names begin with a pattern, a regular expression; "encoder" is that of any model.

    Raises a SegFitError if these are none or all.
    """
    parts = getattr(model, "encoder_parts", ("encoder",))
    wanted = "|".join(rf"{part}\." for part in parts) if pattern == "encoder" else pattern
    named = dict(model.named_parameters())
    found = [parameter for name, parameter in named.items() if re.match(wanted, name)]
    if not 0 < len(found) < len(named):
        names = dict.fromkeys(".".join(name.split(".")[:2]) for name in named)
        raise SegFitError(
            f"freeze={pattern}: {'nothing is left to train' if found else 'no parameter has a name that begins so'}. Names "
            f"begin with {', '.join(names)}."
        )
    return found


def _refuse_unused(options: DictConfig, model: nn.Module) -> None:
    """Raise a SegFitError with the options that the optimizer or the model has no use for."""
    from timm.optim import get_optimizer_info

    info, problems = get_optimizer_info(options.name), []
    if options.momentum != OptimizerConfig.momentum and not info.has_momentum:
        problems.append(
            f"optimizer.momentum={options.momentum}: has no effect with {options.name}. Set optimizer.betas, or take optimizer=sgd."
        )
    if options.head_lr_factor != 1 and not getattr(model, "head_parts", ()):
        problems.append(
            f"optimizer.head_lr_factor={options.head_lr_factor}: has no effect, all layers of this model are new. Set lr."
        )
    raise_all(problems)


def to_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Return the model on the device, in the memory format that its input has."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=layout)
