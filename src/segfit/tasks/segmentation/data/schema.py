"""The schema of data with masks, and what can be wrong with it; never torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.config.check import shown
from segfit.config.schema import REQUIRED, DataConfig, SplitConfig, option


@dataclass
class MaskDataConfig(DataConfig):
    """What every source of images and masks has."""

    num_classes: int = option(REQUIRED, "Classes predicted; ignored pixels are none.", ge=2, le=255)
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
        ge=0,
        le=1,
    )
    mean: list[float] | None = option(
        None,
        "Subtracted from RGB or bands in 0-1. null: what the model's pretrained weights were made for, else ImageNet's; for "
        "other than three bands the mean of the three.",
        ge=0,
        le=1,
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
    ignore_index: int | None = option(255, "Ignored mask value; null: none.", ge=-65536, le=65535)
    # Any: OmegaConf cannot merge a typed map that is None with what is typed on the command line
    label_map: Any = option(None, "Mask value → class, or 255: ignored; others are an error.")
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
    decode: str = option(
        "cpu",
        "gpu: workers pass training images, JPEG files, as they are, and the card decodes and fits them, by nvImageCodec.",
        choices=("cpu", "gpu"),
    )
    slice_axis: int = option(2, "Axis along which NIfTI volumes are cut into slices.", ge=0, le=2)
    window: list[float] | None = option(
        None,
        "These percentiles of each image become black and white; null: only with value_range=percentiles, [1, 99].",
        ge=0,
        le=100,
    )
    split: SplitConfig = field(default_factory=SplitConfig)


def channels_of(config: DictConfig) -> int:
    """Return the channels of the images that the model sees."""
    return len(config.data.get("bands") or "RGB")


def data_problems(data: DictConfig, augmentation: str) -> Iterator[str]:
    """Yield what is impossible or contradicts itself in a data config, beyond the values of single options."""
    count = data.num_classes
    if data.name == "shapes" and count != 4:
        yield f"data.num_classes={count}: shapes always has 4 classes."
    for key, unit in (("class_names", "name"), ("class_colors", "RGB triple")):
        given = data[key]
        if given is not None and len(given) != count:
            yield f"data.{key} has {len(given)} entries for num_classes={count}: one {unit} a class."
    names = list(data.class_names or [])
    for name in sorted({*names}):
        if not name.strip() or names.count(name) > 1:
            yield f"data.class_names: {name!r} is no name, or that of two classes."
    for color in data.class_colors or []:
        if len(whole_numbers(color, 0, 255)) != 3:
            yield f"data.class_colors: {shown(color)} is no RGB triple of 0 to 255."
    if data.background is not None and data.background >= count:
        yield f"data.background={data.background}: must be below num_classes={count}."
    channels = len(data.get("bands") or "RGB")
    what = "three numbers, for R, G and B" if channels == 3 else f"{channels} numbers, one a band"
    for key in ("mean", "std"):
        if data[key] is not None and len(data[key]) != channels:
            yield f"data.{key}={shown(data[key])}: must be {what}."
    if data.name == "folder":
        yield from _folder_problems(data)
        if data.decode == "gpu":
            keys = ("cache", "on_bad_sample", "image_mode", "bands", "value_range")
            given = [
                f"data.{key}={shown(data[key])}"
                for key in keys
                if data[key] != getattr(FolderConfig, key)
            ]
            given += ["data.mask_format=parts"] * (data.mask_format == "parts")
            given += ["augmentation=cpu"] * (augmentation == "cpu")
            if given:
                yield f"data.decode=gpu: {' and '.join(given)} needs pixels in the workers. Change that, or set data.decode=cpu."


def whole_numbers(values: Any, low: int, high: int) -> list[int]:
    """Return a list of whole numbers from low to high as it is; an empty one for anything else."""
    fits = isinstance(values, list) or OmegaConf.is_list(values)
    fits = fits and all(type(value) is int and low <= value <= high for value in values)
    return list(values) if fits else []


def label_map_of(data: DictConfig) -> Any:
    """Return `data.label_map` as a dict of numbers, None for null; values that are wrong as they are."""
    if not OmegaConf.is_dict(data.label_map):
        return data.label_map
    # A key typed by itself, +data.label_map.1=1, is text.
    given = {str(key): (key, target) for key, target in data.label_map.items()}
    return {int(k) if re.fullmatch(r"-?\d+", k) else key: to for k, (key, to) in given.items()}


def _folder_problems(data: DictConfig) -> Iterator[str]:
    label_map = label_map_of(data) or {}
    if not isinstance(label_map, dict):
        yield f"data.label_map={shown(data.label_map)}: must be {{mask value: class, …}}."
        label_map = {}
    targets = {*range(data.num_classes), 255, data.ignore_index}
    for value, target in label_map.items():
        known = type(value) is int and -65536 <= value <= 65535
        if not known or type(target) is not int or target not in targets:
            yield (
                f"data.label_map: {value!s} → {target} is not two whole numbers: a mask value (-65536 to 65535) and its class "
                f"(0 to {data.num_classes - 1}), or 255, which is ignored."
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
    window, pair = data.window, data.value_range
    if window is not None and (len(window) != 2 or window[0] > window[1]):
        yield f"data.window={shown(window)}: must be [low, high]."
    numbers = OmegaConf.is_list(pair) and all(type(value) in (int, float) for value in pair)
    if not (pair in ("auto", "percentiles") or (numbers and len(pair) == 2 and pair[0] < pair[1])):
        yield f"data.value_range={shown(pair)}: must be auto, percentiles or [low, high], low below high."
    elif window is not None and numbers:
        yield f"data.window and data.value_range={shown(pair)} are two answers: set one of them."


def color_table(data: DictConfig) -> dict[int, int]:
    """Return the classes of data.colors by 0xRRGGBB."""
    rows = [[*row, place] for place, row in enumerate(data.colors or [])]
    return {row[0] << 16 | row[1] << 8 | row[2]: row[3] for row in rows}


def _check_colors(data: DictConfig) -> Iterator[str]:
    for row in data.colors:
        if len(row) not in (3, 4) or len(whole_numbers(row[:3], 0, 255)) != 3:
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
