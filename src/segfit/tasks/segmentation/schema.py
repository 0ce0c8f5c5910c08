"""The schema of a segmentation run, and what can be wrong with it; never torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.config.check import LARGEST, shown
from segfit.config.schema import (
    REQUIRED,
    DataConfig,
    EvaluateConfig,
    MetricsConfig,
    ModelConfig,
    RunConfig,
    SplitConfig,
    option,
)
from segfit.errors import SegFitError, nearest

LARGEST_SIDE = 16384  # of image_size in pixels
SHARE: Any = {"ge": 0, "le": 1}  # limits of a probability
UNIT = "img"
FLOAT64 = False
# Scores that can pick the best checkpoint, and whether more or less of them is better.
MONITORS = {
    **dict.fromkeys(
        ("miou", "macro_f1", "foreground_f1", "foreground_iou", "pixel_accuracy"), "max"
    ),
    "loss": "min",
}
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
    checkpointing: bool = option(
        False, "Recompute activations in backward: about 30 % slower, 40 % less memory."
    )


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
    decoder_channels: int = option(
        256, "Channels of the deepest decoder level; halved a level.", ge=8, le=4096
    )
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
    zoom_anywhere: bool = option(
        True, "Zoom about a random point, not the centre: zoomed in, it is a random crop."
    )
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
class MaskDataConfig(DataConfig):
    """What every source of images and masks has."""

    num_classes: int = option(
        REQUIRED, "Classes to predict; ignored pixels are none.", ge=2, le=255
    )
    class_names: list[str] | None = option(None, "One a class; null: class_0, class_1, …")
    class_colors: list[list[int]] | None = option(None, "[R, G, B] a class; null: distinct hues.")
    background: int | None = option(None, "Class that the foreground scores leave out.", ge=0)
    fit: str = option(
        "stretch",
        "How an image meets image_size. stretch: resized to it. pad: resized to fit inside, rest "
        "ignored. crop: random crops in training, a sliding window in evaluation.",
        choices=("stretch", "pad", "crop"),
    )
    sampling: str = option(
        "uniform",
        "uniform: each training image once an epoch. balanced: a class is drawn, then an image that has it.",
        choices=("uniform", "balanced"),
    )
    crops_per_image: int = option(
        1, "Of fit=crop: crops of a training image each time that it is read.", ge=1, le=1024
    )
    foreground: float = option(
        0.0,
        "Of fit=crop: share of training crops around a pixel of a class that is drawn, not background; 0.33 in nnU-Net.",
        **SHARE,
    )
    mean: list[float] | None = option(
        None,
        "Subtracted from RGB or bands in 0-1. null: what the model's pretrained weights were made for, else ImageNet's; for "
        "other than three bands the mean of the three.",
        **SHARE,
    )
    std: list[float] | None = option(None, "Divides them; null as for mean.", ge=0.001)


@dataclass
class ShapesConfig(MaskDataConfig):
    """Built-in textured phantoms: no files, deterministic by index."""

    name: str = "shapes"
    num_classes: int = 4
    train_size: int = option(512, "Images to train on.", ge=1, le=10_000_000)
    val_size: int = option(64, "Held-out images.", ge=1, le=10_000_000)
    test_size: int = option(64, "Held-out images that no choice is made on.", ge=1, le=10_000_000)
    resolution: int = option(128, "Side of the drawn image in pixels.", ge=32, le=16384)
    data_seed: int = option(0, "Another seed, another data set.", ge=0)


@dataclass
class FolderConfig(MaskDataConfig):
    """Images and masks in folders, with or without train/, val/ and test/ above them."""

    name: str = "folder"
    root: str = option(REQUIRED, "The folder that holds images and masks.")
    images: str = option("images", "Folder of the images, below root or root/<split>.")
    masks: str = option("masks", "Folder of masks (CSV of mask_format=rle, JSON of coco).")
    mask_format: str = option(
        "png",
        "png: one index or palette mask an image. parts: CelebAMask-HQ's one file a part. "
        "rle: a CSV of run-lengths (id, class, segmentation), as UW-Madison's. coco: its JSON. yolo: a text file of outlines "
        "an image. labelme: a JSON file an image.",
        choices=("png", "parts", "rle", "coco", "yolo", "labelme"),
    )
    image_name: str | None = option(
        None, "What image files are called, where only a part is the mask's, too: {stem}_0000.png."
    )
    mask_name: str | None = option(
        None, "What the mask of an image is called: {stem}_mask.png, or {name}.png for a.jpg.png."
    )
    unmasked: str = option(
        "error",
        "Images without a mask. skip: left out. background: all of them is the background class.",
        choices=("error", "skip", "background"),
    )
    ignore_index: int | None = option(
        255, "Mask value that counts nowhere; null: none.", ge=-65536, le=65535
    )
    # Any: OmegaConf cannot merge a typed map that is None with what is typed on the command line
    label_map: Any = option(
        None, "Mask value → class, or 255: ignored; values that it does not name are an error."
    )
    colors: list[list[int]] | None = option(
        None,
        "Colour masks: a row [R, G, B] a class, in the order of the classes, or rows [R, G, B, class (or ignore_index)].",
    )
    image_mode: str = option(
        "rgb", "rgb, or gray: one channel, 8 or 16 bit, repeated to three.", choices=("rgb", "gray")
    )
    value_range: Any = option(
        "auto",
        "Values of the files that become black and white. auto: the whole range of 8 or 16 bits, of floats and negative "
        "numbers each image's own. [low, high], for any depth. percentiles: of each image, those of window.",
    )
    bands: list[int] | None = option(
        None,
        "Bands of the files, from 1, that become the channels, e.g. [3, 2, 1, 4]; null: grey or RGB.",
        ge=1,
        le=65535,
    )
    slice_axis: int = option(2, "Axis along which NIfTI volumes are cut into slices.", ge=0, le=2)
    window: list[float] | None = option(
        None,
        "These percentiles of each image become black and white; null: only with value_range=percentiles, [1, 99].",
        ge=0,
        le=100,
    )
    split: SplitConfig = field(default_factory=SplitConfig)


@dataclass
class LossConfig:
    """A weighted sum of terms; each is normalised over the whole effective batch."""

    name: str = option(
        REQUIRED,
        "Terms by name.",
        choices=("ce", "dice", "dice_ce", "focal", "tversky", "lovasz", "lovasz_ce"),
    )
    class_weights: Any = option(
        "none", "none, balanced (a power of the inverse pixel share), or one number a class."
    )
    balance: float = option(0.5, "Exponent of the inverse pixel share of balanced.", ge=0, le=1)
    label_smoothing: float = option(0.0, "Of cross-entropy and focal.", ge=0, lt=1)
    region_weight: float = option(0.5, "Share of dice or lovasz; ce has the rest.", ge=0, le=1)
    focal_gamma: float = option(2.0, "Focusing (Lin et al., arXiv 1708.02002).", ge=0, le=100)
    tversky_alpha: float = option(
        0.3, "Weight of false positives (arXiv 1706.05721).", ge=0, le=1000
    )
    tversky_beta: float = option(0.7, "Weight of false negatives.", ge=0, le=1000)


_OPERATIONS = [
    item.name for item in fields(AugmentationConfig) if item.name not in ("name", "swap")
]
USED = (
    ("loss.name", "ce dice_ce lovasz_ce focal", "label_smoothing"),
    ("loss.name", "dice_ce lovasz_ce", "region_weight"),
    ("loss.name", "focal", "focal_gamma"),
    ("loss.name", "tversky", "tversky_alpha tversky_beta"),
    ("loss.class_weights", "balanced", "balance"),
    ("data.fit", "crop", "crops_per_image foreground"),
    ("augmentation.name", "cpu kornia-gpu", " ".join(_OPERATIONS)),
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
    """Of evaluate.py."""

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
    rounded = math.ceil if share > 1 else math.floor
    rows, columns = (
        rounded(side * math.sqrt(share) / _SIDES) * _SIDES for side in size_of(config.image_size)
    )
    while min(rows, columns) >= 2 * _SIDES:
        size = rows if rows == columns else [rows, columns]
        yield {"image_size": size}, "small things are lost"
        rows, columns = rows - _SIDES, columns - _SIDES


def problems(config: DictConfig) -> Iterator[str]:
    """Yield what is impossible or contradicts itself in a composed run, beyond the values of single options."""
    try:
        size_of(config.image_size)
    except SegFitError as error:
        yield from error.problems
    yield from _check_ranges(config)
    yield from _check_classes(config)
    if config.data.name == "folder":
        yield from _check_folder(config.data)


def size_of(image_size: Any) -> tuple[int, int]:
    """Return (height, width) of an image_size: a side in pixels, or a pair of them.

    Raises:
        SegFitError: if it is neither.
    """
    listed = isinstance(image_size, (list, tuple)) or OmegaConf.is_list(image_size)
    pair = list(image_size) if listed else [image_size] * 2
    sides = [side for side in pair if isinstance(side, int) and 32 <= side <= LARGEST_SIDE]
    if not len(pair) == len(sides) == 2:
        raise SegFitError(
            f"image_size={shown(image_size)}: must be a side in pixels, or [height, width], each at least 32 "
            f"and at most {LARGEST_SIDE}."
        )
    return sides[0], sides[1]


def channels_of(config: DictConfig) -> int:
    """Return the channels of the images that the model sees."""
    return len(config.data.get("bands") or "RGB")


def _check_ranges(config: DictConfig) -> Iterator[str]:
    for key in ("augmentation.scale", "augmentation.blur_sigma", "data.window"):
        pair = OmegaConf.select(config, key)
        if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
            yield f"{key}={shown(pair)}: must be [low, high]."
    count = channels_of(config)
    what = "three numbers, for R, G and B" if count == 3 else f"{count} numbers, one a band"
    for key in ("mean", "std"):
        if config.data[key] is not None and len(config.data[key]) != count:
            yield f"data.{key}={shown(config.data[key])}: must be {what}."
    if config.loss.name == "tversky" and config.loss.tversky_alpha + config.loss.tversky_beta == 0:
        yield "loss.tversky_alpha=0 with loss.tversky_beta=0: the loss would be 0 whatever is predicted."
    if config.augmentation.mixup + config.augmentation.cutmix > 1:
        yield "augmentation.mixup + augmentation.cutmix: a batch gets one of them, so at most 1 together."


def _check_classes(config: DictConfig) -> Iterator[str]:
    data, count = config.data, config.data.num_classes
    for key, unit in (("class_names", "name"), ("class_colors", "RGB triple")):
        given = data[key]
        if given is not None and len(given) != count:
            yield f"data.{key} has {len(given)} entries for num_classes={count}: one {unit} a class."
    names = list(data.class_names or [])
    for name in sorted({*names}):
        if not name.strip():
            yield f"data.class_names: {name!r} is no name."
        elif names.count(name) > 1:
            yield f"data.class_names: {name} stands for more than one class."
    for color in data.class_colors or []:
        if len(_whole(color, 0, 255)) != 3:
            yield f"data.class_colors: {shown(color)} is no RGB triple of 0 to 255."
    if data.background is not None and data.background >= count:
        yield f"data.background={data.background}: must be below num_classes={count}."
    pairs = [list(pair) for pair in config.augmentation.swap or []]
    swapped = {label for pair in pairs for label in _whole(pair, 0, count - 1)}
    if len(swapped) != 2 * len(pairs) or any(len(pair) != 2 for pair in pairs):
        yield (
            f"augmentation.swap={shown(pairs)}: must be pairs of classes (0 to {count - 1}), each class in one of them at most."
        )
    weights = config.loss.class_weights
    numbers = weights if OmegaConf.is_list(weights) else []
    if len(numbers) == count and all(_is_weight(value) for value in numbers):
        if not any(numbers):
            yield f"loss.class_weights={shown(weights)}: with these nothing would be learnt."
    elif weights not in ("none", "balanced"):
        yield (
            f"loss.class_weights={shown(weights)}: must be none, balanced or {count} numbers of at least 0, one a class."
            + nearest(shown(weights), ["none", "balanced"])
        )
    if data.name == "shapes" and count != 4:
        yield f"data.num_classes={count}: shapes always has 4 classes."


def _whole(values: Any, low: int, high: int) -> list[int]:
    """Return the whole numbers from low to high of a list; nothing of what is none, or holds anything else."""
    fits = isinstance(values, list) or OmegaConf.is_list(values)
    fits = fits and all(type(value) is int and low <= value <= high for value in values)
    return list(values) if fits else []


def color_table(data: DictConfig) -> dict[int, int]:
    """Return the classes of data.colors by 0xRRGGBB."""
    rows = [[*row, place] for place, row in enumerate(data.colors or [])]
    return {row[0] << 16 | row[1] << 8 | row[2]: row[3] for row in rows}


def _check_colors(data: DictConfig) -> Iterator[str]:
    for row in data.colors:
        if len(row) not in (3, 4) or len(_whole(row[:3], 0, 255)) != 3:
            yield f"data.colors: {shown(row)} is neither [R, G, B] nor [R, G, B, class], of 0 to 255."
            return
    table = color_table(data)
    for target in sorted({*table.values()} - {*range(data.num_classes), data.ignore_index}):
        yield (
            f"data.colors: {target} is neither a class (0 to {data.num_classes - 1}) nor ignore_index={data.ignore_index}."
        )
    if len(table) < len(data.colors):
        yield "data.colors lists a colour twice."
    if data.label_map is not None:
        yield "data.colors and data.label_map are two answers: set one of them."


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= LARGEST


def label_map_of(data: DictConfig) -> Any:
    """Return `data.label_map` as a dict of numbers, None for null; values that are wrong as they are."""
    if not OmegaConf.is_dict(data.label_map):
        return data.label_map
    # A key typed by itself, +data.label_map.1=1, is text.
    given = {str(key): (key, target) for key, target in data.label_map.items()}
    return {int(k) if re.fullmatch(r"-?\d+", k) else key: to for k, (key, to) in given.items()}


def _check_folder(data: DictConfig) -> Iterator[str]:
    label_map = label_map_of(data) or {}
    if not isinstance(label_map, dict):
        yield f"data.label_map={shown(data.label_map)}: must be {{mask value: class, …}}."
        label_map = {}
    targets = {*range(data.num_classes), 255, data.ignore_index}
    for value, target in label_map.items():
        if type(value) is not int or type(target) is not int:
            yield f"data.label_map: {value!s} → {target} must be two whole numbers."
        elif not -65536 <= value <= 65535:
            yield f"data.label_map: {value} is no mask value; they are -65536 to 65535."
        elif target not in targets:
            yield (
                f"data.label_map: {value} → {target} is neither a class (0 to {data.num_classes - 1}) nor 255, which is ignored."
            )
    if data.colors is not None:
        yield from _check_colors(data)
    for key, marks in (("image_name", "{stem}"), ("mask_name", "{stem} or {name}")):
        template = data[key]
        if template is None:
            continue
        if len(found := re.findall(r"{\w*}", template)) != 1 or found[0] not in marks.split():
            yield f"data.{key}={template}: must hold {marks}, once."
        if data.mask_format != "png":
            yield f"data.{key} needs data.mask_format=png."
    if (label_map or data.colors) and data.mask_format != "png":
        yield "data.label_map and data.colors need data.mask_format=png; the others are matched by data.class_names."
    if not data.root:
        yield "data.root is empty: give the folder that holds images and masks."
    if data.bands is not None and data.image_mode == "gray":
        yield "data.bands and data.image_mode=gray are two answers: a grey image is data.bands=[1]."
    pair = data.value_range
    numbers = OmegaConf.is_list(pair) and all(type(value) in (int, float) for value in pair)
    if not (pair in ("auto", "percentiles") or (numbers and len(pair) == 2 and pair[0] < pair[1])):
        yield f"data.value_range={shown(pair)}: must be auto, percentiles or [low, high], low below high."
    elif data.window is not None and numbers:
        yield f"data.window and data.value_range={shown(pair)} are two answers: set one of them."
