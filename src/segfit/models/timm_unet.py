"""A U-Net decoder on any encoder of timm that yields a pyramid of features."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import pos_embed
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from segfit.errors import SegFitError, nearest
from segfit.models.build import Weights, check_keys, find, read_state_dict
from segfit.models.layers import resize, resize_embeddings

GOOD_ENCODERS = (
    "resnet34, convnext_atto, efficientnet_b0, mobilenetv3_large_100, vit_small_patch14_dinov2"
)
# by what features of one stride are resized, as ViTDet does (arXiv 2203.16527)
PYRAMID = (4, 2, 1, 0.5)
MIN_CHANNELS = 16  # of a decoder level, however often decoder_channels is halved

# All families of timm's resize their embeddings of positions here, by a kernel whose backward adds atomically on CUDA.
pos_embed.F = SimpleNamespace(**{**vars(F), "interpolate": resize_embeddings})


class DecoderBlock(nn.Module):
    """Resize deep features to a skip connection, join, two 3×3 convolutions with norm and ReLU.

    Shapes: deep `(B, deep_channels, h, w)`, skip `(B, skip_channels, H, W)` → `(B, channels, H, W)`.
    """

    def __init__(self, deep_channels: int, skip_channels: int, channels: int) -> None:
        super().__init__()
        first = Conv2dNormActivation(deep_channels + skip_channels, channels)
        self.convs = nn.Sequential(*first, *Conv2dNormActivation(channels, channels))

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """Fuse `deep` into `skip`."""
        return self.convs(torch.cat([resize(deep, skip.shape[-2:]), skip], dim=1))  # type: ignore[no-any-return]


class TimmUnet(nn.Module):
    """U-Net (Ronneberger et al., arXiv 1505.04597) with a timm encoder as its contracting path.

    Logits are made at the encoder's first resolution (stride 2 or 4) and resized to the image. The encoder is of
    `timm.create_model(..., features_only=True)`; the last four blocks of a vision transformer, all of one stride, are
    resized to a pyramid. `weights` of the finished model says what its encoder starts from.

    Args:
        encoder: a name from `timm.list_models()`, with or without a pretrained tag (`name.tag`).
        num_classes: channels of the logits.
        weights: `auto` (timm's checkpoint of this name from cache or hub, else random), a hub name,
            folder or file that must load, or None for random.
        decoder_channels: channels of the deepest decoder level; halved a level, 16 at least.
        dropout: probability that a channel is dropped before the classifier.
        checkpointing: recompute the encoder's blocks or stages in backward instead of keeping their activations.
        channels: of the images.

    Raises:
        SegFitError: an encoder that is unknown, yields no pyramid or works at one image size only, or named weights
            that do not load.
    """

    head_parts: ClassVar = ("decoder.", "classifier.")

    def __init__(
        self,
        encoder: str,
        num_classes: int,
        *,
        weights: str | None = "auto",
        decoder_channels: int = 256,
        dropout: float = 0.1,
        checkpointing: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.encoder, self.weights = make_encoder(encoder, weights, channels)
        info: Any = self.encoder.feature_info
        strides: list[int] = info.reduction()
        self.pyramid = PYRAMID if len(strides) == len(PYRAMID) and len(set(strides)) == 1 else None
        if not self.pyramid and (len(set(strides)) < 3 or strides != sorted(strides)):
            raise SegFitError(
                f"model.encoder: its features have the strides {strides}; a U-Net needs a pyramid. "
                f"Take for example {GOOD_ENCODERS}."
            )
        self.tokens_last = str(getattr(self.encoder, "output_fmt", "NCHW")).endswith("NHWC")
        self.size_multiple = size_multiple(self.encoder, strides[-1], channels)
        deepest = strides[-1] / self.pyramid[-1] if self.pyramid else strides[-1]
        self.two_pixels = int(2 * deepest)  # a side that leaves two of the deepest features
        *skips, deep = info.channels()
        self.decoder = nn.ModuleList()
        for level, skip in enumerate(reversed(skips)):
            wide = max(decoder_channels // 2**level, MIN_CHANNELS)
            self.decoder.append(DecoderBlock(deep, skip, wide))
            deep = wide
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(deep, num_classes, 1)
        if checkpointing:
            cast(Any, getattr(self.encoder, "model", self.encoder)).set_grad_checkpointing()
        self.train()

    def forward(self, images: Tensor) -> Tensor:
        """Return float logits `(B, num_classes, H, W)` of normalised images `(B, 3, H, W)`, any H, W ≥ 32."""
        height, width = images.shape[-2:]
        down, right = -height % self.size_multiple, -width % self.size_multiple
        # Batch norm has nothing to go by in a single value a channel.
        if self.training and len(images) == 1 and max(height, width) < self.two_pixels:
            right = self.two_pixels - width
        padded = F.pad(images, (0, right, 0, down)) if down or right else images
        features = self.encoder(padded)
        if self.tokens_last:
            features = [f.permute(0, 3, 1, 2) for f in features]
        if self.pyramid:
            features = [
                resize(f, [max(int(side * scale), 1) for side in f.shape[-2:]])
                for f, scale in zip(features, self.pyramid, strict=True)
            ]
        x, *skips = reversed(features)
        for block, skip in zip(self.decoder, skips, strict=True):
            x = block(x, skip)
        logits = resize(self.classifier(self.dropout(x)), padded.shape[-2:])
        return logits[..., :height, :width]


def make_encoder(encoder: str, weights: str | None, channels: int = 3) -> tuple[nn.Module, Weights]:
    """Return a model of `timm.create_model(..., features_only=True)` and its weights; arguments and errors as `TimmUnet`'s."""
    name = encoder.split(".")[0]
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models()) or f" Good ones: {GOOD_ENCODERS}."
        raise SegFitError(f"model.encoder={encoder}: timm knows no such model.{hint}")
    options: dict[str, Any] = {"features_only": True, "in_chans": channels}
    vit = {"dynamic_img_size": True, "out_indices": len(PYRAMID)}  # embeddings of positions resized
    try:
        config = timm.get_pretrained_cfg(encoder)
        file, report = find(weights, (config and config.hf_hub_id) or None, encoder)
        if file:
            state = read_state_dict(file)  # refuses what would run code before timm opens the file
            if weights != "auto":
                _check_keys(encoder, file, state)
            overlay = {"file": str(file), "custom_load": False}
            options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
        # Built for any image size where its family has a switch for that.
        for switches in (vit, {"strict_img_size": False}):
            with contextlib.suppress(TypeError):  # most families know none: they never were strict
                return timm.create_model(encoder, **switches, **options), report
        return timm.create_model(encoder, **options), report
    # Families that have no features of several strides say so in each of these ways.
    except (RuntimeError, AttributeError, NotImplementedError, AssertionError) as error:
        raise SegFitError(
            f"model.encoder={encoder}: timm can't make a feature extractor of it ({error}). "
            f"Take for example {GOOD_ENCODERS}."
        ) from error


def size_multiple(encoder: nn.Module, stride: int, channels: int = 3) -> int:
    """Return what height and width have to be divisible by, found by trying: 1, or the last stride."""
    for multiple, size in ((1, (65, 97)), (stride, (2 * stride, 3 * stride))):
        try:
            with torch.no_grad():
                encoder.eval()(torch.zeros(1, channels, *size))
        except (AssertionError, RuntimeError, ValueError):
            continue
        return multiple
    raise SegFitError(
        "model.encoder: it works at one image size only. "
        f"Take one that works at any, for example {GOOD_ENCODERS}."
    )


def _check_keys(encoder: str, file: Path, state: Mapping[str, Tensor]) -> None:
    """Hold a file that was given by name against the whole timm model, but for its classifier.

    timm itself would load what fits and leave the rest random without a word.
    """
    reference = timm.create_model(encoder, pretrained=False)
    classifier = reference.pretrained_cfg.get("classifier") or ()
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    expected = {
        key: value.shape
        for key, value in reference.state_dict().items()
        if not key.startswith(tuple(f"{head}." for head in heads))
    }
    check_keys(
        file,
        f"timm's {encoder}",
        "Give a state dict that this timm model saved, or change model.encoder.",
        missing=expected.keys() - state,
        of_another_shape=[
            key
            for key in expected.keys() & state
            if state[key].shape != expected[key] and key != "pos_embed"  # which timm resizes
        ],
    )
