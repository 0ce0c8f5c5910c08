"""The schema of a restoration run, and what can be wrong with it; never torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from segfit.config.check import shown
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

UNIT = "patch"
FLOAT64 = True
# Scores that can pick the best checkpoint, and whether more or less of them is better.
MONITORS = {"psnr": "max", "ssim": "max", "loss": "min"}
# Scores that are shown, in this order, and what they are called.
COLUMNS = {"psnr": "PSNR", "psnr_gain": "gain", "ssim": "SSIM"}
LPIPS = ("alex", "vgg", "squeeze")  # its networks; docs/metrics.md says where weights are found


@dataclass
class CnnConfig(ModelConfig):
    """Norm-free residual U-Net behind a pixel-unshuffle; what it predicts is added to the picture."""

    name: str = "cnn"
    base_channels: int = option(32, "Channels of the first level; doubled a level.", ge=4, le=1024)
    num_blocks: int = option(4, "Blocks of each level, down and again up.", ge=1, le=100)
    checkpointing: bool = option(False, "Recompute in backward: about 30 % slower, less memory.")


@dataclass
class NafnetConfig(CnnConfig):
    """NAFNet (Chen et al., arXiv 2204.04676): gates instead of activations, channel attention, layer norm."""

    name: str = "nafnet"


@dataclass
class DegradeConfig:
    """What is done to clean pictures; the network learns to undo it. A range is drawn from anew for each patch."""

    name: str = option(REQUIRED, "Which degradation.")


@dataclass
class NoiseConfig(DegradeConfig):
    """Gaussian noise."""

    name: str = "noise"
    sigma: Any = option(25.0, "Standard deviation, 0-255; or [low, high].", ge=0, le=255)


@dataclass
class BlurConfig(DegradeConfig):
    """Blur, then noise."""

    name: str = "blur"
    kind: str = option("gaussian", "What blurs.", choices=("gaussian", "motion"))
    sigma: Any = option([0.5, 3.0], "Of gaussian, in pixels: a number or [low, high].", ge=0, le=20)
    length: Any = option([5, 21], "Of motion, in pixels: a number or [low, high].", ge=1, le=99)
    noise: Any = option(2.0, "Of the noise, as sigma of degrade=noise.", ge=0, le=255)


@dataclass
class JpegConfig(DegradeConfig):
    """JPEG compression."""

    name: str = "jpeg"
    quality: Any = option([10, 50], "1 (worst) to 100, or [low, high].", ge=1, le=100)


@dataclass
class MixedConfig(DegradeConfig):
    """Gaussian blur, then noise, then JPEG, as pictures from phones and the web have been through."""

    name: str = "mixed"
    blur: Any = option([0.1, 1.5], "Sigma in pixels: a number or [low, high].", ge=0, le=20)
    noise: Any = option([1.0, 15.0], "Of the noise, as sigma of degrade=noise.", ge=0, le=255)
    quality: Any = option([40, 95], "Of JPEG: a number or [low, high].", ge=1, le=100)


@dataclass
class PictureDataConfig(DataConfig):
    """What every source of pictures has."""

    image_mode: str = option("rgb", "gray: one channel, luminance.", choices=("rgb", "gray"))
    patches: int = option(4, "Patches of a picture each time that it is decoded.", ge=1, le=1024)


@dataclass
class ShapesConfig(PictureDataConfig):
    """Built-in phantoms, 8 bit: no files, deterministic by index."""

    name: str = "shapes"
    train_size: int = option(128, "Pictures to train on.", ge=1, le=10_000_000)
    val_size: int = option(16, "Held-out pictures.", ge=1, le=10_000_000)
    test_size: int = option(16, "Held-out pictures that no choice is made on.", ge=1, le=10_000_000)
    resolution: int = option(256, "Side of the drawn picture in pixels.", ge=32, le=16384)
    data_seed: int = option(0, "Another seed, another data set.", ge=0)


@dataclass
class FolderConfig(PictureDataConfig):
    """Clean pictures in a folder, which are degraded as they train."""

    name: str = "folder"
    root: str = option(REQUIRED, "The folder that holds the pictures.")
    train: str = option("train", "Folder below root of those to train on.")
    val: str = option("val", "Folder of those to validate on; without it, a share of train's.")
    test: str = option("test", "Folder of those to test on. Without the three, root is divided.")
    split: SplitConfig = field(default_factory=SplitConfig)


@dataclass
class PairsConfig(FolderConfig):
    """Degraded pictures and their clean partners, two folders of equal names."""

    name: str = "pairs"
    input: str = option("input", "Folder of the degraded pictures, below root or root/<split>.")
    target: str = option("target", "Folder of the clean ones.")


@dataclass
class LossConfig:
    """A mean over pixels or patches, and perhaps a perceptual term."""

    name: str = option(REQUIRED, "What is averaged.", choices=("charbonnier", "l1", "mse", "psnr"))
    epsilon: float = option(1e-3, "Of charbonnier: sqrt(error² + epsilon²).", gt=0, le=1)
    perceptual: float = option(0.0, "Weight of the perceptual term; 0: none.", ge=0, le=1000)
    encoder: str = option("vgg16", "Whose features it compares: any of timm with features_only.")
    weights: str | None = option(
        "auto",
        "Of the encoder. auto: timm's pretrained tag, from cache or hub; a hub name, a folder or a file. They must load. "
        "null: random ones, which compare nothing: to measure speed and memory.",
    )


@dataclass
class ScoreConfig(MetricsConfig):
    """How PSNR and SSIM are computed (docs/metrics.md), and scores besides them."""

    channels: str = option("rgb", "y: on luma of YCbCr (BT.601).", choices=("rgb", "y"))
    crop_border: int = option(0, "Pixels at each side that do not count.", ge=0, le=1024)
    rounded: bool = option(True, "Round to 8 bits first, as published scores do.")
    lpips: str | None = option(None, "LPIPS, too, by this network.", choices=LPIPS)


@dataclass
class EvaluateScoreConfig(MetricsConfig):
    """How PSNR and SSIM are computed, and scores besides them; null: as in training."""

    channels: str | None = option(None, "rgb, or y: on luma.", choices=("rgb", "y"))
    crop_border: int | None = option(None, "Pixels at each side that do not count.", ge=0, le=1024)
    rounded: bool | None = option(None, "Round to 8 bits first.")
    lpips: str | None = option(None, "LPIPS, too.", choices=LPIPS)


USED = (
    ("loss.name", "charbonnier", "epsilon"),
    ("loss.perceptual", "", "encoder weights"),
    ("degrade.kind", "gaussian", "sigma"),
    ("degrade.kind", "motion", "length"),
)


@dataclass
class Run(RunConfig):
    """A restoration training."""

    degrade: DegradeConfig = REQUIRED
    loss: LossConfig = field(default_factory=LossConfig)
    metrics: ScoreConfig = field(default_factory=ScoreConfig)
    patch_size: int = option(REQUIRED, "Side of a training patch in pixels.", ge=16, le=4096)
    tile: int = option(1024, "Side of tiles that larger pictures are cut into.", ge=64, le=16384)
    monitor: str = option("psnr", "Score that picks the best checkpoint.", choices=tuple(MONITORS))


@dataclass
class Evaluate(EvaluateConfig):
    """evaluate.py of a restoration run."""

    images: str | None = option(None, "A folder of degraded pictures, or one, to restore instead.")
    tile: int | None = option(None, "As in training; null: the run's.", ge=64, le=16384)
    overlap: int = option(64, "Pixels that two tiles share; half a tile at most.", ge=0, le=4096)
    flip: bool = option(False, "Average eight turns and mirror images (arXiv 1707.02921).")
    save_images: bool = option(True, "Write the restored pictures, as PNG of their input's depth.")
    worst: int = option(8, "How many of the worst pictures are shown.", ge=0)
    metrics: EvaluateScoreConfig = field(default_factory=EvaluateScoreConfig)


GROUPS: dict[str, dict[str, type]] = {
    "model": {"cnn": CnnConfig, "nafnet": NafnetConfig},
    "data": {"shapes": ShapesConfig, "folder": FolderConfig, "pairs": PairsConfig},
    "degrade": {kind.name: kind for kind in (NoiseConfig, BlurConfig, JpegConfig, MixedConfig)},
}


# What to change where a single sample does not fit.
MEMORY_ADVICE = "Lower patch_size or tile, model.base_channels or model.num_blocks, or set model.checkpointing=true."
# Options of data that memory depends on.
MEMORY_OPTIONS = ("image_mode",)
_SIDES = 16  # smaller patches have sides that are multiples of it


def channels_of(config: DictConfig) -> int:
    """Return the channels of a config's pictures: 1 or 3."""
    return 1 if config.data.image_mode == "gray" else 3


def sample_label(config: DictConfig) -> str:
    """Return what a sample of a config is called: its width × height, and grey if it is."""
    side = config.patch_size
    return f"{side} × {side}" + (" grey" if channels_of(config) == 1 else "")


def held_out_shape(config: DictConfig) -> tuple[int, ...]:
    """Return (height, width) that held-out pictures are taken to have: unknown ones are as large as a tile."""
    size = config.get("benchmark", {}).get("original_size")
    if size is None:
        size = config.data.resolution if config.data.name == "shapes" else config.tile
    height, width = [size] * 2 if isinstance(size, int) else size
    return int(height), int(width)


def smaller_samples(config: DictConfig, share: float) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield options for ever smaller patches and what they cost, from a share of the pixels on; above 1: a larger one."""
    rounded = math.ceil if share > 1 else math.floor
    side = rounded(config.patch_size * math.sqrt(share) / _SIDES) * _SIDES
    if side == config.patch_size:
        side -= _SIDES
    while side >= 2 * _SIDES:
        yield {"patch_size": side}, "the network learns from less of a picture"
        side -= _SIDES


def problems(config: DictConfig) -> Iterator[str]:
    """Yield what is impossible or contradicts itself in a composed run, beyond the values of single options."""
    for item in fields(OmegaConf.get_type(config.degrade)):  # type: ignore[arg-type]
        value = config.degrade[item.name]
        pair = list(value) if OmegaConf.is_list(value) else [value, value]
        rises = all(type(one) in (int, float) for one in pair) and pair == sorted(pair)
        if "ge" in item.metadata and not (rises and len(pair) == 2):
            yield f"degrade.{item.name}={shown(value)}: must be a number or [low, high]."
    data = config.data
    if data.name == "shapes":
        if data.resolution < config.patch_size:
            yield f"data.resolution={data.resolution}: smaller than patch_size={config.patch_size}."
        return
    if not data.root:
        yield "data.root is empty: give the folder that holds the pictures."
    if data.name == "pairs" and data.input == data.target:
        yield f"data.input={data.input}: the same folder as data.target."


def training_problems(config: DictConfig) -> Iterator[str]:
    """Yield what benchmark.py may measure, but nothing can learn from."""
    if config.loss.perceptual and config.loss.weights is None:
        yield (
            "loss.weights=null: random features compare nothing, and serve benchmark.py alone. Take loss.weights=auto, a hub "
            "name or a file; or loss.perceptual=0."
        )


def evaluation_problems(options: DictConfig) -> Iterator[str]:
    """Yield what contradicts itself in the options of evaluate.py."""
    if options.tile is not None and options.overlap >= options.tile:
        yield f"overlap={options.overlap}: must be less than tile={options.tile}."
