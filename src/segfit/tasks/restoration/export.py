"""A restoration model as a program without SegFit."""

import json

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.models.build import Exported, for_inference
from segfit.tasks.restoration.schema import channels_of


class Deployed(nn.Module):
    """A model for pictures of any size, with its results in [0, 1]."""

    def __init__(self, model: nn.Module, multiple: int) -> None:
        super().__init__()
        self.model, self.multiple = model, multiple

    def forward(self, images: Tensor) -> Tensor:
        """Return restored pictures `(B, C, H, W)` float32 in [0, 1] of degraded ones of the same shape."""
        sides = dict(zip((-2, -1), images.shape[-2:], strict=True))
        # The model's own margin, by indices: torch.export would guard on what padding does to the size.
        for axis, side in sides.items():
            # ONNX rounds the division of a negative number up: not -(-side // multiple).
            whole = (side + self.multiple - 1) // self.multiple * self.multiple
            images = images.index_select(axis, torch.arange(whole).clamp(max=side - 1))
        restored: Tensor = self.model(images).clamp(0, 1)
        for axis, side in sides.items():
            restored = restored.index_select(axis, torch.arange(side))
        return restored


def make_exported(config: DictConfig, model: nn.Module) -> Exported:
    """Return what is exported of a run's model, which may be changed."""
    network = for_inference(model).cpu().float()
    side, channels = config.patch_size, channels_of(config)
    facts = {"image_mode": config.data.image_mode, "range": [0, 1], "degrade": config.degrade.name}
    return Exported(
        Deployed(network, network.multiple).eval(),  # type: ignore[arg-type]
        {"images": torch.zeros(2, channels, side, side)},
        {"model.json": json.dumps(facts)},
        sizes=2,
        outputs=("restored",),
    )
