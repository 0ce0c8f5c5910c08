"""Restoration losses that add up: accumulated micro-batches have the loss of one big batch.

A loss is one or two terms. Each is a sum over the batch, divided by a total of the whole update:

    totals = sum(loss.totals(targets) for targets in micro_batches)
    for outputs, targets in micro_batches:
        loss(outputs, targets, totals).backward()

Outputs and targets are `(B, C, H, W)` float; targets lie in [0, 1]. Nothing here waits for the device.
"""

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.engine.precision import Precision
from segfit.errors import SegFitError
from segfit.tasks.restoration.schema import LossConfig


class Perceptual(nn.Module):
    """The distance of pictures in the features of a pretrained network, timm's with `features_only`.

    As in LPIPS (Zhang et al., arXiv 1801.03924), features have unit length at each position, and their squared distance
    is averaged over positions; here all channels count alike, and all levels too. The network takes heights and widths
    that are divisible by `multiple`, and runs in `precision`.
    """

    def __init__(self, encoder: nn.Module, multiple: int, precision: Precision) -> None:
        super().__init__()
        self.encoder = encoder.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.multiple = multiple
        self.precision = precision
        self.channels = -1 if str(getattr(encoder, "output_fmt", "NCHW")).endswith("NHWC") else 1
        trained_on: Any = encoder.pretrained_cfg
        self.mean, self.std = (
            nn.Buffer(torch.tensor(trained_on[name]).view(3, 1, 1)) for name in ("mean", "std")
        )

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the sum of the pictures' distances, `()`."""
        with torch.no_grad():
            wanted = self._features(targets)
        distances = [
            (found - expected).square().sum(self.channels).flatten(1).mean(1)
            for found, expected in zip(self._features(outputs), wanted, strict=True)
        ]
        return torch.stack(distances).mean(0).sum()

    def _features(self, images: Tensor) -> list[Tensor]:
        rim = (0, -images.shape[3] % self.multiple, 0, -images.shape[2] % self.multiple)
        images = F.pad((images - self.mean) / self.std, rim, mode="replicate")  # grey: to all three
        with self.precision.autocast():
            features = self.encoder(images.contiguous(memory_format=torch.channels_last))
        return [F.normalize(one.float(), dim=self.channels) for one in features]


class RestorationLoss(nn.Module):
    """A mean over all values, or over pictures, and perhaps a perceptual term.

    l1 and mse are means over values; so is charbonnier, √(error² + epsilon²), which is L1 but smooth at 0 (Lai et al.,
    arXiv 1710.01992). psnr is the negative PSNR in dB, a mean over pictures as in NAFNet (Chen et al., arXiv 2204.04676).
    The perceptual term's network runs in the `precision` of the step; its weights are random for `weights` None, which
    serves to plan memory and for nothing else. Raises a SegFitError if the encoder's weights cannot be had.
    """

    def __init__(self, options: LossConfig, precision: Precision) -> None:
        super().__init__()
        self.name, self.epsilon, self.weight = options.name, options.epsilon, options.perceptual
        known = options.encoder, options.weights
        self.perceptual = _perceptual(*known, precision) if self.weight > 0 else None

    def totals(self, targets: Tensor) -> Tensor:
        """Return the divisor of each term, `(K,)` float32, to be summed over the micro-batches of an update."""
        counts = [len(targets) if self.name == "psnr" else targets.numel()]
        if self.perceptual is not None:
            counts.append(len(targets))
        # Filled on the device: a copy from the host would make it wait.
        return torch.stack([targets.new_full((), one, dtype=torch.float32) for one in counts])

    def forward(self, outputs: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the loss, `()` float32 (float64 for float64 outputs): sums over pixels overflow fp16.

        Outputs are of any float type; `totals` are those of the whole update.
        """
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        loss = self._sum(outputs - targets) / totals[0]
        if self.perceptual is not None:
            loss = loss + self.weight * self.perceptual(outputs, targets) / totals[1]
        return loss

    def _sum(self, errors: Tensor) -> Tensor:
        if self.name == "l1":
            return errors.abs().sum()
        if self.name == "mse":
            return errors.square().sum()
        if self.name == "charbonnier":
            return (errors.square() + self.epsilon**2).sqrt().sum()
        return 10 * (errors.square().mean((1, 2, 3)) + 1e-8).log10().sum()


def _perceptual(encoder: str, weights: str | None, precision: Precision) -> Perceptual:
    import timm

    from segfit.models.timm_unet import make_encoder, size_multiple

    try:
        if weights == "auto" and timm.is_model(encoder.split(".")[0]):
            weights = getattr(timm.get_pretrained_cfg(encoder), "hf_hub_id", None)
            if weights is None:
                raise SegFitError(
                    f"loss.encoder={encoder}: timm has no hub checkpoint of it, and random features compare nothing. "
                    "Give loss.weights=<file>, or another encoder."
                )
        network, _ = make_encoder(encoder, weights)
        info: Any = network.feature_info
        return Perceptual(network, size_multiple(network, info.reduction()[-1]), precision)
    except SegFitError as error:  # about the encoder of a model, whose options are called so, too
        text = str(error).replace(
            "model.weights=null: random weights", "loss.perceptual=0: no such term"
        )
        text = re.sub(r"\bmodel\.(encoder|weights)=", r"loss.\1=", text)
        raise SegFitError(text.split("\n")) from error
