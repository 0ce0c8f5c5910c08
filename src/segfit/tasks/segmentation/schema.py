"""The schema of a segmentation run, and what can be wrong with it; never torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.config.check import LARGEST, plain, shown
from segfit.config.schema import (
    REQUIRED,
    EvaluateConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    option,
)
from segfit.errors import SegFitError, nearest
from segfit.tasks.segmentation.data.schema import (
    FolderConfig,
    ShapesConfig,
    data_problems,
    whole_numbers,
)

LARGEST_SIDE = 16384  # of image_size in pixels
SHARE: Any = {"ge": 0, "le": 1}  # limits of a probability
UNIT = "img"
# Scores that can pick the best checkpoint, and whether more or less of them is better.
_SCORES = ("miou", "macro_f1", "foreground_f1", "foreground_iou", "pixel_accuracy")
MONITORS = {**dict.fromkeys(_SCORES, "max"), "loss": "min"}
# Scores that are shown, in this order, and what they are called.
COLUMNS = {"miou": "mIoU", "macro_f1": "macro F1", "foreground_f1": "foreground F1"}


@dataclass
class SegFormerConfig(ModelConfig):
    """SegFormer (Xie et al., arXiv 2105.15203), Hugging Face's parameters and state-dict keys."""

    name: str = "segformer"
    variant: str = option("b0", "Encoder size.", choices=("b0", "b1", "b2", "b3", "b4", "b5"))
    weights: str | None = option(
        "auto",
        "auto: nvidia/segformer-bN-finetuned-ade-512-512 if the cache or the hub has it, else random "
        "with a warning. A hub name or a folder must load. null: random.",
    )
    fast: bool = option(True, "Exact, faster forwards; false runs transformers' own, to compare.")
    dropout: float = option(0.1, "Dropout before the classifier.", ge=0, lt=1)
    drop_path: float = option(0.1, "Stochastic depth of the deepest layer.", ge=0, lt=1)
    checkpointing: bool = option(False, "Recompute in backward: ~30 % slower, ~40 % less memory.")


@dataclass
class CnnConfig(ModelConfig):
    """SegFit's own residual U-Net, for training from random weights."""

    name: str = "cnn"
    base_channels: int = option(32, "Channels at full resolution; doubled a level.", ge=4, le=1024)
    num_blocks: int = option(2, "Residual blocks a level.", ge=1, le=100)
    dropout: float = option(0.1, "Dropout before the classifier.", ge=0, lt=1)


@dataclass
class TimmUnetConfig(ModelConfig):
    """A U-Net decoder on any timm encoder that knows `features_only`."""

    name: str = "timm_unet"
    encoder: str = option("resnet34", "Any name from timm.list_models().")
    weights: str | None = option(
        "auto",
        "auto: timm's pretrained tag if the cache or the hub has it, else random with a warning. "
        "A file must load. null: random.",
    )
    decoder_channels: int = option(256, "Channels at the bottom; halved a level.", ge=8, le=4096)
    dropout: float = option(0.1, "Dropout before the classifier.", ge=0, lt=1)
    checkpointing: bool = option(False, "Recompute the encoder in backward: slower, less memory.")


@dataclass
class AugmentationConfig:
    """One list of operations for both places: torchvision v2 in the workers, Kornia on the device.

    Each operation changes an image with its probability; 0 switches it off.
    """

    name: str = option(REQUIRED, "Where it runs.", choices=("none", "cpu", "kornia-gpu"))
    hflip: float = option(0.5, "Probability of a left-right flip.", **SHARE)
    vflip: float = option(0.0, "Probability of an upside-down flip.", **SHARE)
    swap: list[list[int]] | None = option(
        None,
        "Pairs of classes that a mirror image exchanges, left and right: [[4, 5], …]. For flips here and in evaluate.py.",
    )
    affine: float = option(0.7, "Probability of rotation and scale.", **SHARE)
    degrees: float = option(20.0, "Rotation is drawn from ± this many degrees.", ge=0, le=180)
    scale: list[float] = option(
        [0.8, 1.2], "Zoom is drawn log-uniformly from this range.", ge=0.01, le=100
    )
    zoom_anywhere: bool = option(True, "Zoom about a random point, like a random crop.")
    color_jitter: float = option(0.5, "Probability of colour jitter.", **SHARE)
    brightness: float = option(0.3, "Factor drawn from 1 ± this.", **SHARE)
    contrast: float = option(0.2, "Factor drawn from 1 ± this.", **SHARE)
    saturation: float = option(0.2, "Factor drawn from 1 ± this.", **SHARE)
    hue: float = option(0.1, "Shift from ± this, in turns of the colour circle.", ge=0, le=0.5)
    blur: float = option(0.1, "Probability of a Gaussian blur.", **SHARE)
    blur_sigma: list[float] = option([0.1, 2.0], "Range of its sigma in pixels.", gt=0, le=100)
    noise: float = option(0.1, "Probability of Gaussian noise.", **SHARE)
    noise_std: float = option(0.05, "Its standard deviation, of the value range 0-1.", **SHARE)
    mixup: float = option(0.0, "Probability that a batch is mixed by MixUp.", **SHARE)
    mixup_alpha: float = option(0.4, "Beta(alpha, alpha) draws the share.", gt=0, le=1000)
    cutmix: float = option(0.0, "Probability that a batch is mixed by CutMix.", **SHARE)
    cutmix_alpha: float = option(1.0, "Beta(alpha, alpha) draws the area.", gt=0, le=1000)


@dataclass
class LossConfig:
    """A weighted sum of terms; each is normalised over the whole effective batch."""

    name: str = option(
        REQUIRED,
        "Terms by name.",
        choices=("ce", "dice", "dice_ce", "focal", "tversky", "lovasz", "lovasz_ce"),
    )
    class_weights: Any = option("none", "none, balanced (by inverse pixel share), or one a class.")
    balance: float = option(0.5, "Exponent of the inverse pixel share of balanced.", ge=0, le=1)
    label_smoothing: float = option(0.0, "Of cross-entropy and focal.", ge=0, lt=1)
    region_weight: float = option(0.5, "Share of dice or lovasz; ce has the rest.", ge=0, le=1)
    focal_gamma: float = option(2.0, "Focusing (Lin et al., arXiv 1708.02002).", ge=0, le=100)
    tversky_alpha: float = option(0.3, "Cost of false positives (arXiv 1706.05721).", ge=0, le=1000)
    tversky_beta: float = option(0.7, "Cost of false negatives.", ge=0, le=1000)


_DRAWN = [item.name for item in fields(AugmentationConfig) if item.name not in ("name", "swap")]
USED = (
    ("loss.name", "ce dice_ce lovasz_ce focal", "label_smoothing"),
    ("loss.name", "dice_ce lovasz_ce", "region_weight"),
    ("loss.name", "focal", "focal_gamma"),
    ("loss.name", "tversky", "tversky_alpha tversky_beta"),
    ("loss.class_weights", "balanced", "balance"),
    ("data.fit", "crop", "crops_per_image foreground"),
    ("augmentation.name", "cpu kornia-gpu", " ".join(_DRAWN)),
    ("augmentation.affine", "", "degrees scale"),
    ("augmentation.color_jitter", "", "brightness contrast saturation hue"),
    ("augmentation.blur", "", "blur_sigma"),
    ("augmentation.noise", "", "noise_std"),
    ("augmentation.mixup", "", "mixup_alpha"),
    ("augmentation.cutmix", "", "cutmix_alpha"),
)


@dataclass
class Run(RunConfig):
    """A segmentation training."""

    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    image_size: Any = option(REQUIRED, "What the model sees: side in pixels, or [height, width].")
    monitor: str = option("miou", "Score that picks the best checkpoint.", choices=tuple(MONITORS))


@dataclass
class EvaluateScoreConfig(MetricsConfig):
    """Scores besides the usual ones."""

    boundary: float | None = option(
        None,
        "Boundary F-score, surface Dice (NSD) and missed objects, too; boundaries so many pixels apart agree.",
        ge=0,
        le=10_000,
    )


@dataclass
class Evaluate(EvaluateConfig):
    """evaluate.py of a segmentation run."""

    images: str | None = option(None, "A folder of images, or one, to predict; no masks needed.")
    flip: bool = option(False, "Average with the prediction of the mirrored image.")
    sliding_window: bool = option(
        False,
        "Predict at full resolution in windows of image_size, batch_size at once; always on for data.fit=crop.",
    )
    overlap: float = option(0.5, "Share of a window that the next one covers again.", ge=0, lt=1)
    threshold: float | None = option(
        None, "Of two classes: the second where its probability is above; null: 0.5.", gt=0, lt=1
    )
    # Any: fit, or a number
    temperature: Any = option(
        None,
        "Divides logits. fit: fitted on split=val and kept with the run; null: as kept, else 1.",
    )
    probabilities: str | None = option(
        None,
        "Write probabilities/<id>.npy, (num_classes, H, W), too: true or float16; uint8: 255 is 1.",
        choices=("True", "False", "float16", "uint8"),
    )
    save_masks: bool = option(True, "Write predicted masks and overlays, at the original size.")
    worst: int = option(8, "How many of the worst images are shown as pictures.", ge=0)
    metrics: EvaluateScoreConfig = field(default_factory=EvaluateScoreConfig)


GROUPS: dict[str, dict[str, type]] = {
    "model": {"segformer": SegFormerConfig, "cnn": CnnConfig, "timm_unet": TimmUnetConfig},
    "data": {"shapes": ShapesConfig, "folder": FolderConfig},
}
MEMORY_ADVICE = "Lower image_size, choose a smaller model, set model.checkpointing=true (SegFormer), or take augmentation=cpu."
MEMORY_OPTIONS = ("num_classes", "fit", "bands")
_SIDES = 32  # smaller images have sides that are multiples of it


def sample_label(config: DictConfig) -> str:
    """Return what a sample of a config is called: its width × height."""
    height, width = size_of(config.image_size)
    return f"{width} × {height}"


def held_out_shape(config: DictConfig) -> tuple[int, ...]:
    """Return (height, width) that held-out images are taken to have, as far as the config knows."""
    size = config.get("benchmark", {}).get("original_size")
    if size is not None:
        return size_of(size)
    if config.data.name == "shapes":
        return int(config.data.resolution), int(config.data.resolution)
    height, width = size_of(config.image_size)
    return (2 * height, 2 * width) if config.data.fit == "crop" else (height, width)


def smaller_samples(config: DictConfig, share: float) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield options for ever smaller samples and what they cost, from a share of the pixels on; above 1 it is rounded up."""
    rounded, steps = math.ceil if share > 1 else math.floor, math.sqrt(share) / _SIDES
    rows, columns = (rounded(side * steps) * _SIDES for side in size_of(config.image_size))
    while min(rows, columns) >= 2 * _SIDES:
        size = rows if rows == columns else [rows, columns]
        yield {"image_size": size}, "small things are lost"
        rows, columns = rows - _SIDES, columns - _SIDES


def size_of(image_size: Any) -> tuple[int, int]:
    """Return (height, width) of an image_size: a side in pixels, or a pair of them; raise a SegFitError if it is neither."""
    listed = isinstance(image_size, (list, tuple)) or OmegaConf.is_list(image_size)
    pair = list(image_size) if listed else [image_size] * 2
    sides = [side for side in pair if isinstance(side, int) and 32 <= side <= LARGEST_SIDE]
    if not len(pair) == len(sides) == 2:
        raise SegFitError(
            f"image_size={shown(image_size)}: must be a side in pixels, or [height, width], each at least 32 "
            f"and at most {LARGEST_SIDE}."
        )
    return sides[0], sides[1]


def problems(config: DictConfig) -> Iterator[str]:
    """Yield what is impossible or contradicts itself in a composed run, beyond the values of single options."""
    try:
        size_of(config.image_size)
    except SegFitError as error:
        yield from error.problems
    yield from data_problems(config.data, config.augmentation.name)
    augmentation, loss, count = config.augmentation, config.loss, config.data.num_classes
    for key in ("scale", "blur_sigma"):
        pair = augmentation[key]
        if len(pair) != 2 or pair[0] > pair[1]:
            yield f"augmentation.{key}={shown(pair)}: must be [low, high]."
    pairs = [list(pair) for pair in augmentation.swap or []]
    swapped = {label for pair in pairs for label in whole_numbers(pair, 0, count - 1)}
    if len(swapped) != 2 * len(pairs) or any(len(pair) != 2 for pair in pairs):
        yield (
            f"augmentation.swap={shown(pairs)}: must be pairs of classes (0 to {count - 1}), each class in one of them at most."
        )
    if augmentation.mixup + augmentation.cutmix > 1:
        yield "augmentation.mixup + augmentation.cutmix: a batch gets one of them, so at most 1 together."
    if loss.name == "tversky" and loss.tversky_alpha + loss.tversky_beta == 0:
        yield "loss.tversky_alpha=0 with loss.tversky_beta=0: the loss would be 0 whatever is predicted."
    weights = loss.class_weights
    if is_weights(plain(weights) if OmegaConf.is_list(weights) else None, count):
        if not any(weights):
            yield f"loss.class_weights={shown(weights)}: with these nothing would be learnt."
    elif weights not in ("none", "balanced"):
        yield (
            f"loss.class_weights={shown(weights)}: must be none, balanced or {count} numbers of at least 0, one a class."
            + nearest(shown(weights), ["none", "balanced"])
        )


def evaluation_problems(options: DictConfig) -> Iterator[str]:
    """Yield what contradicts itself in the options of evaluate.py."""
    given = options.temperature
    if given not in (None, "fit") and not (type(given) in (int, float) and 0 < given <= LARGEST):
        yield f"temperature={given}: must be fit or a number above 0."
    others = options.images, options.export, options.compare
    if given == "fit" and (options.split != "val" or others != (None, None, None)):
        yield "temperature=fit is fitted on split=val alone: leave split, images, export and compare away."


def is_weights(values: Any, count: int) -> bool:
    """Return whether a value is a list of so many class weights."""
    kinds = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    return kinds and len(values) == count and all(0 <= value <= LARGEST for value in values)
