"""`check` tells everything that is wrong with a config in one error."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.config.schema import EvaluateConfig, FolderConfig, RunConfig
from segfit.errors import SegFitError, nearest

LARGEST = 2**32 - 1  # of any whole number; seeds of NumPy end here, and nothing else needs more
LARGEST_SIDE = 16384  # of image_size in pixels
_PLAIN_LISTS = ("list[int]", "list[float]", "list[str]")


def check(config: DictConfig) -> None:
    """Raise one SegFitError that names every missing, impossible or contradicting value."""
    problems = [*_check_options(config, "")]
    if not problems and issubclass(OmegaConf.get_type(config) or object, RunConfig):
        problems = [*_check_run(config)]
    if not problems and OmegaConf.get_type(config) is EvaluateConfig:
        problems = [*_check_evaluation(config)]
    if problems:
        raise SegFitError(problems)


def _check_evaluation(config: DictConfig) -> Iterator[str]:
    if config.export is not None and (config.images is not None or config.out is not None):
        yield "export writes the model alone: leave images and out away, or leave export away."
    for key in ("run", "images", "out", "export", "root"):
        if config[key] is not None and not config[key]:
            yield f"{key} is empty: give a path, or leave it away."


def _check_options(config: DictConfig, prefix: str) -> Iterator[str]:
    schema = OmegaConf.get_type(config)
    if schema is None or not is_dataclass(schema):
        return
    known = [item.name for item in fields(schema)]
    for name in config:
        if name not in known:
            yield f"{prefix}{name!s}: there is no such key.{nearest(str(name), known)}"
    missing = [name for name in known if name not in list(config)]
    yield from (f"{prefix}{name}: cannot be taken out." for name in missing)
    for item in fields(schema):
        key = f"{prefix}{item.name}"
        if item.name in missing:
            continue
        if OmegaConf.is_missing(config, item.name):
            yield f"{key} has no value: give it on the command line ({key}=…). {_help(item)}"
            continue
        value = config[item.name]
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) is not dict:
            yield from _check_options(value, f"{key}.")
        elif item.name == "name" and "help" not in item.metadata and value != item.default:
            group = prefix.rstrip(".")
            yield f"{key}={value}: cannot be set; choose by {group}=…, which brings the right options."
        elif value is not None:
            values = value if OmegaConf.is_list(value) else [value]
            if OmegaConf.is_list(value) and not value:
                yield f"{key}=[]: must hold a value. {_help(item)}"
            for one in values:
                # OmegaConf takes a mapping for an item of list[float]; items of Any are looked at below.
                nested = OmegaConf.is_config(one) and str(item.type).startswith(_PLAIN_LISTS)
                problem = "must be plain values." if nested else _problem(one, item.metadata)
                if problem:
                    yield f"{key}={_show(value)}: {problem} {_help(item)}"
                    break


def _help(item: Any) -> str:
    return f"({item.metadata['help']})" if "help" in item.metadata else ""


def _show(value: Any) -> str:
    return str(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


_LIMITS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", lambda value, limit: value >= limit),
    "gt": ("more than", lambda value, limit: value > limit),
    "le": ("at most", lambda value, limit: value <= limit),
    "lt": ("less than", lambda value, limit: value < limit),
}


def _problem(value: Any, metadata: Any) -> str:
    if isinstance(value, str) and "${" in value:
        return "must not hold ${, the mark of a reference: a run that keeps it could not be read again."
    if metadata.get("choices") and value not in metadata["choices"]:
        return f"must be one of {', '.join(metadata['choices'])}." + nearest(
            str(value), metadata["choices"]
        )
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not math.isfinite(value):  # not every int is a float
            return "must be a finite number."
        for key, (words, holds) in _LIMITS.items():
            if key in metadata and not holds(value, metadata[key]):
                return f"must be {words} {metadata[key]:g}."
        if isinstance(value, int) and abs(value) > LARGEST:
            return f"must be at most {LARGEST}."
    return ""


def plain(config: Any) -> Any:
    """Return a config as dicts, lists and values."""
    return OmegaConf.to_container(config, resolve=True)


def size_of(image_size: Any) -> tuple[int, int]:
    """Return (height, width) of an image_size: a side in pixels, or a pair of them.

    Raises:
        SegFitError: if it is neither.
    """
    pair = [image_size] * 2 if isinstance(image_size, int) else image_size
    good = isinstance(pair, (list, tuple)) or OmegaConf.is_list(pair)
    if (
        not good
        or len(pair) != 2
        or not all(isinstance(side, int) and 32 <= side <= LARGEST_SIDE for side in pair)
    ):
        raise SegFitError(
            f"image_size={_show(image_size)}: must be a side in pixels, or [height, width], each at least 32 "
            f"and at most {LARGEST_SIDE}."
        )
    return int(pair[0]), int(pair[1])


def _check_run(config: DictConfig) -> Iterator[str]:
    try:
        size_of(config.image_size)
    except SegFitError as error:
        yield from error.problems
    if config.resume_sweep is not None:
        yield (
            f"resume_sweep={config.resume_sweep}: only train.py takes it, as a key of its own, with nothing but "
            f"hydra.… beside it."
        )
    yield from _check_ranges(config)
    yield from _check_classes(config)
    if OmegaConf.get_type(config.data) is FolderConfig:
        yield from _check_folder(config.data)
    if config.patience is not None and config.patience * config.val_every >= config.epochs > 1:
        yield (
            f"patience={config.patience} with val_every={config.val_every} can never stop a run of "
            f"epochs={config.epochs}: lower it, or set patience=null."
        )


def _check_ranges(config: DictConfig) -> Iterator[str]:
    ranges = {
        "augmentation.scale": config.augmentation.scale,
        "augmentation.blur_sigma": config.augmentation.blur_sigma,
        "data.window": config.data.get("window") if "window" in config.data else None,
    }
    for key, pair in ranges.items():
        if pair is not None and (len(pair) != 2 or pair[0] > pair[1]):
            yield f"{key}={_show(pair)}: must be [low, high]."
    for key in ("mean", "std"):
        if len(config.data[key]) != 3:
            yield f"data.{key}={_show(config.data[key])}: must be three numbers, for R, G and B."
    if config.optimizer.betas is not None and len(config.optimizer.betas) not in (2, 3):
        yield f"optimizer.betas={_show(config.optimizer.betas)}: must be two or three numbers."
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
    for name in sorted({name for name in data.class_names or [] if not name.strip()}):
        yield f"data.class_names: {name!r} is no name."
    twice = {name for name in data.class_names or [] if list(data.class_names).count(name) > 1}
    if twice:
        yield f"data.class_names: {', '.join(sorted(twice))} stands for more than one class."
    for color in data.class_colors or []:
        numbers = OmegaConf.is_list(color) and all(isinstance(value, int) for value in color)
        if not numbers or len(color) != 3 or not all(0 <= value <= 255 for value in color):
            yield f"data.class_colors: {_show(color)} is no RGB triple of 0 to 255."
    if data.background is not None and data.background >= count:
        yield f"data.background={data.background}: must be below num_classes={count}."
    weights = config.loss.class_weights
    if isinstance(weights, str):
        if weights not in ("none", "balanced"):
            yield (
                f"loss.class_weights={weights}: must be none, balanced or a list of numbers."
                + nearest(weights, ["none", "balanced"])
            )
    elif not OmegaConf.is_list(weights):
        yield f"loss.class_weights={_show(weights)}: must be none, balanced or a list of numbers."
    elif len(weights) != count or not all(_is_weight(value) for value in weights):
        yield (
            f"loss.class_weights={_show(weights)}: must be {count} numbers of at least 0, one a class."
        )
    elif not any(weights):
        yield f"loss.class_weights={_show(weights)}: with these nothing would be learnt."
    if data.name == "shapes" and count != 4:
        yield f"data.num_classes={count}: shapes always has 4 classes."


def _is_weight(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value <= LARGEST


def _check_folder(data: DictConfig) -> Iterator[str]:
    label_map = {} if data.label_map is None else data.label_map
    if not OmegaConf.is_dict(label_map) and label_map != {}:
        yield f"data.label_map={_show(label_map)}: must be {{mask value: class, …}}."
        label_map = {}
    for value, target in label_map.items():
        if type(value) is not int or type(target) is not int:
            yield f"data.label_map: {value!s} → {target} must be two whole numbers."
            continue
        if not 0 <= value <= 65535:
            yield f"data.label_map: {value} is no mask value; they are 0 to 65535."
        if not 0 <= target < data.num_classes and target != data.ignore_index:
            yield (
                f"data.label_map: {value} → {target} is neither a class (0 to {data.num_classes - 1}) "
                f"nor ignore_index={data.ignore_index}."
            )
    if data.split.group is not None:
        try:
            re.compile(data.split.group)
        except re.error as error:
            yield f"data.split.group={data.split.group}: no valid regular expression ({error})."
    if data.split.val + data.split.test >= 1:
        yield "data.split.val + data.split.test: must leave something to train on (below 1)."
    if label_map and data.mask_format != "png":
        yield "data.label_map needs data.mask_format=png; the others are matched by data.class_names."
    if not data.root:
        yield "data.root is empty: give the folder that holds images and masks."
    if data.window is not None and data.image_mode != "gray":
        yield "data.window needs data.image_mode=gray."
