"""timm's optimizers and schedulers, with groups of parameters for weight decay and learning rate."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from segfit.errors import SegFitError, nearest

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler

# torch's own: one kernel for all parameters, and GradScaler does not synchronise.
_FUSED = ("adam", "adamw", "sgd", "momentum")
_LAYERS = 12


def make_optimizer(
    model: nn.Module,
    *,
    name: str,
    lr: float,
    weight_decay: float,
    momentum: float,
    betas: Sequence[float] | None,
    head_lr_factor: float,
    layer_decay: float,
) -> torch.optim.Optimizer:
    """Return one of timm's optimizers over the model's parameters.

    Biases and norms (one-dimensional parameters) have no weight decay. The learning rate of layers without pretrained
    weights (names that begin with one of `model.head_parts`) is `head_lr_factor` times as high; that of each of the others' layers is `layer_decay`
    times that of the next one.

    Raises a SegFitError if timm has no such optimizer, or it does not take these options.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    known = list_optimizers()
    if name not in known:
        raise SegFitError(
            f"optimizer.name={name}: timm has no such optimizer.{nearest(name, known)} There are: "
            f"{', '.join(known)}."
        )
    options: dict[str, Any] = {"fused": True} if name in _FUSED else {}
    if betas is not None:
        info = get_optimizer_info(name)
        if not info.has_betas:
            raise SegFitError(
                f"optimizer.betas={list(betas)}: {name} has none. Set optimizer.momentum, or take optimizer=adamw."
            )
        if isinstance(info.opt_class, type):  # else another library's, by name
            own = signature(info.opt_class).parameters["betas"].default or (0, 0)
            if len(betas) != len(own):  # timm would find out in the first step
                raise SegFitError(f"optimizer.betas={list(betas)}: {name} takes {len(own)}.")
        options["betas"] = tuple(betas)
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            _groups(model, weight_decay, head_lr_factor, layer_decay),
            opt=name,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            **options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        reason = f"does not work with these options: {error}."
        raise SegFitError(f"optimizer.name={name} {reason}") from error
    return optimizer


def _groups(
    model: nn.Module, weight_decay: float, head_lr_factor: float, layer_decay: float
) -> list[dict[str, Any]]:
    parts: tuple[str, ...] = getattr(model, "head_parts", ())
    new = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    below = _layers_above(model, new) if layer_decay != 1 else {}
    groups: dict[tuple[bool, bool, int], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        key = (parameter.ndim > 1, name in new, below.get(name, 0))
        decay = weight_decay if key[0] else 0.0
        scale = head_lr_factor if key[1] else layer_decay ** key[2]
        group = groups.setdefault(key, {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def _layers_above(model: nn.Module, new: Collection[str]) -> dict[str, int]:
    """Return how many layers lie above each parameter that is not new: timm's layers, else 12 equal parts in order."""
    for prefix, part in model.named_modules():
        if hasattr(part, "group_matcher"):
            from timm.models import group_parameters

            of = group_parameters(part, part.group_matcher(coarse=False), reverse=True)
            return {f"{prefix}.{name}": max(of.values()) - layer for name, layer in of.items()}
    names = [name for name, _ in model.named_parameters() if name not in new]
    return {name: _LAYERS - 1 - place * _LAYERS // len(names) for place, name in enumerate(names)}


def base_rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate of an optimizer's group without the factor of its layers."""
    return float(group["lr"]) / float(group.get("lr_scale", 1))


def make_scheduler(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    updates_per_epoch: int,
    epochs: int,
    warmup: float,
    warmup_factor: float,
    min_factor: float,
    poly_power: float,
    step_epochs: float,
    step_gamma: float,
) -> Scheduler:
    """Return one of timm's schedulers, to be stepped every update; the options are those of `SchedulerConfig`.

    The peak is the learning rate that `optimizer` has; the length is `updates_per_epoch` × `epochs`, warm-up included.
    """
    from timm.scheduler import create_scheduler_v2

    total = updates_per_epoch * epochs
    peak = max(float(group["lr"]) for group in optimizer.param_groups)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "step" if name == "none" else name,  # the factory's "none" has no warm-up
        num_epochs=total,
        updates_per_epoch=1,
        step_on_epochs=False,
        min_lr=min_factor * peak,
        warmup_lr=warmup_factor * peak,
        warmup_epochs=round(warmup * total),
        decay_epochs=max(1, round(step_epochs * updates_per_epoch)),
        decay_rate={"poly": poly_power, "step": step_gamma}.get(name, 1.0),
    )
    return scheduler
