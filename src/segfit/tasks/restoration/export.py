"""A restoration model as a program that needs torch alone."""

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.models.build import for_inference
from segfit.tasks.restoration.schema import channels_of


class Deployed(nn.Module):
    """A model with its results in [0, 1]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Return restored pictures `(B, C, H, W)` float32 in [0, 1] of degraded ones of the same shape."""
        restored: Tensor = self.model(images)
        return restored.clamp(0, 1)


def make_exported(
    config: DictConfig, model: nn.Module
) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """Return what is exported of a run's model, which may be changed, example inputs by name, and no text files."""
    images = torch.zeros(2, channels_of(config), config.patch_size, config.patch_size)
    return Deployed(for_inference(model).cpu().float()).eval(), {"images": images}, {}
