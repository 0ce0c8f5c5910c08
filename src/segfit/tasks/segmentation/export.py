"""A segmentation model as a program that needs torch alone."""

import json

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.models.build import for_inference
from segfit.tasks.segmentation.assembly import make_classes, normalisation_of
from segfit.tasks.segmentation.schema import size_of


class Deployed(nn.Module):
    """A model from uint8 images to logits.

    Args:
        model: takes normalised images.
        mean: of RGB in 0-1, three numbers.
        std: of RGB in 0-1, three numbers.
    """

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.model = model
        self.mean = nn.Buffer(torch.tensor(mean).view(-1, 1, 1))
        self.std = nn.Buffer(torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `(B, num_classes, H, W)` float32 of images `(B, 3, H, W)` uint8."""
        logits: Tensor = self.model((images.float() / 255 - self.mean) / self.std)
        return logits


def make_exported(
    config: DictConfig, model: nn.Module
) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """Return what is exported of a run's model, which may be changed, example inputs by name, and text files."""
    deployed = Deployed(for_inference(model).cpu().float(), *normalisation_of(config))
    images = torch.zeros(2, 3, *size_of(config.image_size), dtype=torch.uint8)
    classes = json.dumps(list(make_classes(config.data).names))
    return deployed.eval(), {"images": images}, {"classes.json": classes}
