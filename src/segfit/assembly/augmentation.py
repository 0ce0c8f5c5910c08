"""Config → augmentation, in the workers or on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from segfit.config.check import plain

if TYPE_CHECKING:
    from segfit.tasks.segmentation.augmentation.cpu import CpuAugment
    from segfit.tasks.segmentation.augmentation.kornia_gpu import KorniaGpu
    from segfit.tasks.segmentation.augmentation.mix import Mix

_MIX = ("mixup", "mixup_alpha", "cutmix", "cutmix_alpha")


def make_cpu_augment(config: DictConfig) -> CpuAugment | None:
    """Return what workers do to each sample, or None if the config augments elsewhere."""
    if config.augmentation.name != "cpu":
        return None
    from segfit.tasks.segmentation.augmentation.cpu import CpuAugment

    return CpuAugment(**_options(config))


def make_gpu_augment(config: DictConfig) -> KorniaGpu | None:
    """Return what the device does to each batch, or None if the config augments elsewhere."""
    if config.augmentation.name != "kornia-gpu":
        return None
    from segfit.tasks.segmentation.augmentation.kornia_gpu import KorniaGpu

    return KorniaGpu(**_options(config))


def make_mix(config: DictConfig) -> Mix | None:
    """Return MixUp and CutMix with the config's probabilities, or None if both are 0."""
    shares = {key: config.augmentation[key] for key in _MIX}
    if config.augmentation.name == "none" or shares["mixup"] + shares["cutmix"] == 0:
        return None
    from segfit.tasks.segmentation.augmentation.mix import Mix

    return Mix(num_classes=config.data.num_classes, **shares)


def _options(config: DictConfig) -> dict[str, Any]:
    options = {k: v for k, v in plain(config.augmentation).items() if k not in ("name", *_MIX)}
    return {**options, "fill": plain(config.data.mean)}
