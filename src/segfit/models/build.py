"""A model by name. Each builder is imported when it is asked for: transformers and timm take seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from segfit.errors import SegFitError


@dataclass(frozen=True)
class Weights:
    """Which weights a model starts from.

    Args:
        source: hub name, path, or "random".
        message: the same in whole sentences, with what to do if they could not be had.
        alarming: pretrained weights were wanted and could not be had.
    """

    source: str
    message: str
    alarming: bool = False


def make_model(
    class_names: Sequence[str], options: Mapping[str, Any], *, pretrained: bool
) -> tuple[nn.Module, Weights]:
    """Return a model (B, 3, H, W) → (B, num_classes, H, W) and which weights it has.

    Args:
        class_names: one logit each.
        options: the fields of the model's config.
        pretrained: False skips `options["weights"]`, when a checkpoint follows anyway.

    Raises:
        SegFitError: if there is no such model, or weights that were named cannot be loaded.
    """
    values = dict(options)
    name = values.pop("name")
    if name == "cnn":
        from segfit.models.cnn import CNN

        return CNN(len(class_names), **values), Weights("random", "There are none for this model.")
    model: nn.Module
    wanted = values.pop("weights")
    weights = wanted if pretrained else None
    if name == "segformer":
        from segfit.models.segformer import make_segformer

        variant = values.pop("variant")
        model, report = make_segformer(
            variant, len(class_names), weights=weights, class_names=tuple(class_names), **values
        )
    elif name == "timm_unet":
        from segfit.models.timm_unet import make_timm_unet

        encoder = values.pop("encoder")
        model, report = make_timm_unet(encoder, len(class_names), weights=weights, **values)
    else:
        raise SegFitError(f"model.name={name}: there is no such model.")
    alarming = weights == "auto" and not report.loaded
    return model, Weights(report.source, report.message, alarming)


def for_inference(model: nn.Module) -> nn.Module:
    """Return the model in the form that computes least, in eval mode; a SegFormer's decode head is merged."""
    from segfit.models.segformer import SegFormer, merge

    return merge(model) if isinstance(model, SegFormer) else model.eval()
