"""SegFormer (Xie et al., arXiv 2105.15203) on Hugging Face's parameters, images in, full-size logits out."""

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from segfit.models.build import Weights, check_keys, find, quiet, read_state_dict
from segfit.models.segformer_fast import MergedDecodeHead, drop_paths, resize_logits, use_fast

# variant → (depths, hidden sizes, decoder hidden size): tables 6 and 7 of the paper
_SMALL, _LARGE = (32, 64, 160, 256), (64, 128, 320, 512)
VARIANTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "b0": ((2, 2, 2, 2), _SMALL, 256),
    "b1": ((2, 2, 2, 2), _LARGE, 256),
    "b2": ((3, 4, 6, 3), _LARGE, 768),
    "b3": ((3, 4, 18, 3), _LARGE, 768),
    "b4": ((3, 8, 27, 3), _LARGE, 768),
    "b5": ((3, 6, 40, 3), _LARGE, 768),
}


class SegFormer(SegformerForSemanticSegmentation):  # type: ignore[misc]
    """transformers' SegFormer with the same parameters, buffers and state-dict keys.

    Its `forward` takes images and returns logits at their size; everything else is inherited.
    """

    encoder_parts: ClassVar = ("segformer",)
    head_parts: ClassVar = ("decode_head.",)

    def forward(self, images: Tensor) -> Tensor:
        """Return float logits `(B, num_classes, H, W)` of normalised images `(B, 3, H, W)`, any H, W ≥ 32."""
        # transformers collects the stages' outputs by hooks that can't be pickled; they are at hand here
        x, features, stages = images, [], self.segformer.stages
        for stage, drawn in zip(stages, drop_paths(stages, images), strict=True):
            x = stage(x, **drawn)
            features.append(x)
        logits = self.decode_head(features)
        return resize_logits(logits, images.shape[-2:])

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that `SegformerForSemanticSegmentation.from_pretrained` loads."""
        stock = SegformerForSemanticSegmentation(self.config)
        with quiet():
            stock.save_pretrained(save_directory, state_dict=self.state_dict(), **kwargs)


def merge(model: SegFormer) -> SegFormer:
    """Return a copy for inference whose decode head is one weight a stage, batch norm included.

    Logits are those of `model.eval()` within rounding. The copy has no gradients and no batch norm to
    train, and its state dict is its own: save `model` instead.
    """
    merged: SegFormer = copy.deepcopy(model).eval().requires_grad_(False)
    merged.decode_head = MergedDecodeHead(merged.decode_head).requires_grad_(False)
    return merged


def make_segformer(
    variant: str,
    num_classes: int,
    *,
    weights: str | None = "auto",
    fast: bool = True,
    dropout: float = 0.1,
    drop_path: float = 0.1,
    checkpointing: bool = False,
    class_names: Sequence[str] | None = None,
    channels: int = 3,
) -> tuple[SegFormer, Weights]:
    """Return a SegFormer and which weights it has.

    Args:
        variant: `b0` … `b5`.
        num_classes: channels of the logits.
        weights: `auto` (NVIDIA's ADE20K checkpoint of this variant from cache or hub, else random),
            a hub name, folder or file that must load, or None for random.
        fast: exact, faster forwards; False keeps transformers' own.
        dropout: probability before the classifier.
        drop_path: stochastic depth of the deepest layer (arXiv 1603.09382), growing linearly from 0.
        checkpointing: recompute each transformer block in backward instead of keeping it.
        class_names: written into the config that `save_pretrained` stores.
        channels: of the images.

    Raises:
        SegFitError: named weights that do not load.
    """
    depths, hidden_sizes, decoder = VARIANTS[variant]
    names = class_names or [f"class_{i}" for i in range(num_classes)]
    config = SegformerConfig(  # that of the variant's hub checkpoint, but for classes and channels
        num_channels=channels,
        depths=depths,
        hidden_sizes=hidden_sizes,
        decoder_hidden_size=decoder,
        classifier_dropout_prob=dropout,
        drop_path_rate=drop_path,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    size = 640 if variant == "b5" else 512  # ADE20K's, which "auto" was trained on
    recommended = f"nvidia/segformer-{variant}-finetuned-ade-{size}-{size}"
    file, report = find(weights, recommended, variant)
    if file is None:
        model = SegFormer._from_config(config, attn_implementation="sdpa")
    else:
        model = _pretrained(config, variant, file)
    if fast:
        use_fast(model)
    if checkpointing:
        for block in (block for stage in model.segformer.stages for block in stage.blocks):
            # the switch of transformers' own layers, without its model-wide method, which 6.0 renames
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    return model.train(), report


def _pretrained(config: SegformerConfig, variant: str, file: Path) -> SegFormer:
    """Return a model with a checkpoint's tensors; only a classifier for another number of classes may be random."""
    state = read_state_dict(file)
    channels = config.num_channels
    for key, value in state.items() if channels != 3 else ():
        if value.ndim == 4 and value.shape[1] == 3:  # the first convolution alone
            from timm.models import adapt_input_conv

            state[key] = adapt_input_conv(channels, value)
    with quiet():  # transformers' own class knows the names that older checkpoints have
        model, info = SegformerForSemanticSegmentation.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=torch.float32,
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    check_keys(
        file,
        f"a SegFormer {variant}",
        "Give the checkpoint of this variant or change model.variant.",
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        of_another_shape={
            key for key in mismatched if not key.startswith("decode_head.classifier.")
        },
    )
    model.__class__ = SegFormer
    return cast(SegFormer, model)
