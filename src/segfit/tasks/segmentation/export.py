"""A segmentation model as a program without SegFit: from an image of any size to its classes."""

import json
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.config.check import plain
from segfit.models.build import Exported, for_inference
from segfit.tasks.segmentation.assembly import normalisation_of
from segfit.tasks.segmentation.classes import make_classes
from segfit.tasks.segmentation.data.schema import channels_of
from segfit.tasks.segmentation.inference import resize_logits
from segfit.tasks.segmentation.schema import size_of


class Deployed(nn.Module):
    """A run's model from uint8 images of any size to logits of that size, fitted as `data.fit` says; "crop" leaves them."""

    def __init__(
        self, model: nn.Module, config: DictConfig, temperature: float, *, classes: bool
    ) -> None:
        super().__init__()
        self.temperature, self.classes = temperature, classes
        self.model, self.size, self.fit = model, size_of(config.image_size), config.data.fit
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation_of(config))
        self.mean, self.std = nn.Buffer(mean), nn.Buffer(std)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits `(B, num_classes, H, W)` float32 of images `(B, C, H, W)` uint8, by the temperature.

        With `classes` their argmax `(B, H, W)` uint8, too.
        """
        logits = self._at_size(images)
        scaled = logits / self.temperature
        return (scaled, logits.argmax(1).to(torch.uint8)) if self.classes else scaled

    def _at_size(self, images: Tensor) -> Tensor:
        pixels, kind = images.float(), torch.float64
        axes = () if self.fit == "crop" else (-1, -2)  # as torch's kernel does, one after the other
        shape = torch.stack([torch.scalar_tensor(side, dtype=kind) for side in images.shape[-2:]])
        start, content = torch.zeros(2, dtype=kind), torch.tensor(self.size, dtype=kind)
        if self.fit == "pad":  # as `place_image` does
            inside = (shape * torch.amin(content / shape, 0)).round().clamp(min=1)
            inside = torch.minimum(inside, content)
            start, content = torch.floor((content - inside) / 2), inside
        for axis in axes:
            pixels = _resize(pixels, axis, shape[axis], self.size[axis], start[axis], content[axis])
        logits: Tensor = self.model((pixels / 255 - self.mean) / self.std)
        for axis in axes[::-1]:
            logits = resize_logits(logits, axis, images.shape[axis], start[axis], content[axis])
        return logits


def _resize(
    pixels: Tensor, axis: int, length: Tensor, target: int, start: Tensor, content: Tensor
) -> Tensor:
    """Return levels 0-255 `(…, H, W)` with `length` pixels along an axis resized to `content` of `target`, 0 around them.

    Bit by bit what torch does to uint8 (bilinear with antialiasing, weights of 15 bits, the rounding in between), in
    operations that every runtime has.
    """
    scale = length / content
    support = scale.clamp(min=1)
    row = torch.arange(target, dtype=torch.float64) - start
    centre = ((row + 0.5) * scale)[:, None]
    at = torch.arange(pixels.shape[axis], dtype=torch.float64)
    first = torch.floor(centre - support + 0.5).clamp(min=0)
    last = torch.minimum(torch.floor(centre + support + 0.5), length)
    inside = ((row >= 0) & (row < content))[:, None] & (at >= first) & (at < last)
    weights = (1 - ((at + 0.5 - centre) / support).abs()).clamp(min=0) * inside
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)
    powers = 2.0 ** torch.arange(1, 23, dtype=torch.float64)
    bits = (weights.max() * powers < 2.0**15 - 0.5).sum()
    weights = torch.floor(weights * 2.0**bits + 0.5)
    # In two parts of 8 and 7 bits, so that float32, and TF32, hold every sum exactly.
    high = torch.floor(weights / 128)
    low = (weights - 128 * high).float()
    along = pixels if axis == -1 else pixels.mT
    rest = torch.floor((along @ low.mT + (2.0 ** (bits - 1)).float()) / 128)
    whole = torch.floor((along @ high.float().mT + rest) / (2.0 ** (bits - 7)).float())
    resized = whole.clamp(0, 255)
    return resized if axis == -1 else resized.mT


def make_exported(
    config: DictConfig, model: nn.Module, temperature: float = 1.0, *_: Any
) -> Exported:
    """Return what is exported of a run's model, which may be changed."""
    network = for_inference(model).cpu().float()
    deployed, onnx = (
        Deployed(network, config, temperature, classes=classes).eval() for classes in (False, True)
    )
    names, (mean, std) = list(make_classes(config.data).names), normalisation_of(config)
    keys = ("fit", "image_mode", "window", "bands", "value_range")
    data = {key: plain(config.data).get(key) for key in keys}
    data["image_mode"] = data["image_mode"] or "rgb"
    facts = {"class_names": names, "image_size": deployed.size, **data, "mean": mean, "std": std}
    facts["temperature"] = temperature
    return Exported(
        deployed,
        {"images": torch.zeros(2, channels_of(config), *deployed.size, dtype=torch.uint8)},
        {"classes.json": json.dumps(names), "model.json": json.dumps(facts)},
        sizes=0 if deployed.fit == "crop" else 2,
        outputs=("logits", "classes"),
        onnx=onnx,
    )
