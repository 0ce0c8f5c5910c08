"""A model by name. Each builder is imported when it is asked for: transformers and timm take seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from segfit.models.weights import Weights, find, recorded_normalisation

Normalisation = tuple[tuple[float, ...], tuple[float, ...]]  # mean and std of RGB in 0-1
IMAGENET: Normalisation = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Exported:
    """What is exported of a model."""

    module: nn.Module  # of torch.export's program
    inputs: Mapping[str, Tensor]  # examples by name; the first dimension counts samples
    files: Mapping[str, str]  # texts that go with it, by name
    sizes: int = 0  # how many of the inputs' last dimensions may have any size
    outputs: Sequence[str] = ("outputs",)  # names of what the ONNX file returns
    onnx: nn.Module | None = None  # of the ONNX file; None: the same module


def make_model(
    class_names: Sequence[str], options: Mapping[str, Any], *, pretrained: bool, channels: int = 3
) -> tuple[nn.Module, Weights]:
    """Return a model (B, channels, H, W) → (B, num_classes, H, W) and which weights it has.

    Args:
        class_names: one logit each.
        options: the fields of the model's config.
        pretrained: False skips `options["weights"]`, when a checkpoint follows anyway.
        channels: of the images. A pretrained first convolution is spread over them as timm does it
            (`timm.models.adapt_input_conv`): its weights for R, G and B in turn, times 3 / channels.

    Raises:
        SegFitError: if weights that were named cannot be loaded.
    """
    values = {**options, "channels": channels}
    name = values.pop("name")
    if name == "cnn":
        from segfit.models.cnn import CNN

        return CNN(len(class_names), **values), Weights()
    if not pretrained:
        values["weights"] = None
    if name == "segformer":
        from segfit.models.segformer import make_segformer

        return make_segformer(
            num_classes=len(class_names), class_names=tuple(class_names), **values
        )
    from segfit.models.timm_unet import TimmUnet

    model = TimmUnet(num_classes=len(class_names), **values)
    return model, model.weights


def normalisation(options: Mapping[str, Any]) -> tuple[str, Normalisation | None]:
    """Return which weights a model starts from, and the mean and std that they were made for; None: nobody says.

    What lies beside the weights counts more than what timm knows of an encoder of this name. `options` as for `make_model`;
    raises a SegFitError as it does.
    """
    weights, encoder = options.get("weights"), options.get("encoder")
    if weights not in (None, "auto"):
        file, _ = find(weights, None, "")
        if file and (found := recorded_normalisation(file)):
            return weights, found
    if encoder is None:
        return options["name"], None
    from timm import get_pretrained_cfg, is_model

    known = get_pretrained_cfg(encoder) if is_model(encoder) else None
    return encoder, known and (known.mean, known.std)


def for_inference(model: nn.Module) -> nn.Module:
    """Return the model in the form that computes least, in eval mode; a SegFormer's decode head is merged."""
    from segfit.models.segformer import SegFormer, merge

    return merge(model) if isinstance(model, SegFormer) else model.eval()
