"""The schema of every config that SegFit composes: each option is documented where it is defined.

Hydra validates names and types when it composes; `segfit.config.check` validates choices, ranges and
contradictions. Nothing here imports torch: composing a config (`--cfg job`, shell completion) has to
answer at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore

REQUIRED: Any = "???"  # OmegaConf's mark for a value that has to be given
DEVICE_HELP = (
    "auto: cuda if there is one. One card of several: CUDA_VISIBLE_DEVICES=0 python … device=cuda."
)


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return a dataclass field with its documentation and the values that `check` accepts.

    `None` always passes where the annotation is Optional; a list is checked item by item.
    """
    limits = {"choices": choices or None, "ge": ge, "gt": gt, "le": le, "lt": lt}
    metadata = {"help": help, **{key: v for key, v in limits.items() if v is not None}}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# ------------------------------------------------------------------------------------- model


@dataclass
class ModelConfig:
    """What every model has."""

    name: str = option(
        REQUIRED, "Which builder makes it.", choices=("segformer", "cnn", "timm_unet")
    )


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
    base_channels: int = option(
        32, "Channels at the highest resolution; doubled a level.", ge=4, le=1024
    )
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


# ------------------------------------------------------------------------ hardware, precision


@dataclass
class TunedForConfig:
    """What the measurements of benchmark=optimize hold for, as text; anything else is told when training starts."""

    device: str = option(REQUIRED, "Its name, memory and, of a CPU, cores.")
    driver: str | None = option(None, "NVIDIA's; null on the CPU.")
    torch: str = option(REQUIRED, "Its version.")
    model: str = option(REQUIRED, "Choice of the group, and what was changed of it.")
    image_size: str = option(REQUIRED, "Width × height.")


@dataclass
class HardwareConfig:
    """The card that the recipe was made for. The recipe itself sets top-level options."""

    name: str = option(REQUIRED, "Tier: cpu, 4gb, 8gb, 12gb, 24gb, or local.")
    vram_gb: float | None = option(None, "Memory of the card, GiB; null for the CPU.", gt=0)
    tuned_for: TunedForConfig | None = option(
        None, "What a recipe of benchmark=optimize was measured for; null: nothing was measured."
    )


@dataclass
class PrecisionConfig:
    """Mixed precision."""

    name: str = option(
        "auto",
        "auto: bf16 where the device does it natively, fp16 with GradScaler on older CUDA cards, "
        "else fp32.",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    tf32: bool = option(True, "Let fp32 matrix products use TF32 on Ampere and later.")
    init_scale: float = option(65536.0, "GradScaler's first scale (fp16).", gt=0, le=1e30)
    growth_interval: int = option(2000, "Steps without overflow before the scale doubles.", ge=1)


# ------------------------------------------------------------------------------ augmentation


@dataclass
class AugmentationConfig:
    """One list of operations for both places: torchvision v2 in the workers, Kornia on the device.

    Each operation strikes an image with its probability; 0 switches it off.
    """

    name: str = option(REQUIRED, "Where it runs.", choices=("none", "cpu", "kornia-gpu"))
    hflip: float = option(0.5, "Probability of a left-right flip.", ge=0, le=1)
    vflip: float = option(0.0, "Probability of an upside-down flip.", ge=0, le=1)
    affine: float = option(0.7, "Probability of rotation and scale.", ge=0, le=1)
    degrees: float = option(20.0, "Rotation is drawn from ± this many degrees.", ge=0, le=180)
    scale: list[float] = option(
        [0.8, 1.2], "Zoom is drawn log-uniformly from this range.", ge=0.01, le=100
    )
    zoom_anywhere: bool = option(
        True, "Zoom about a random point, not the centre: zoomed in, it is a random crop."
    )
    color_jitter: float = option(0.5, "Probability of colour jitter.", ge=0, le=1)
    brightness: float = option(0.3, "Factor drawn from 1 ± this.", ge=0, le=1)
    contrast: float = option(0.2, "Factor drawn from 1 ± this.", ge=0, le=1)
    saturation: float = option(0.2, "Factor drawn from 1 ± this.", ge=0, le=1)
    hue: float = option(
        0.1, "Shift drawn from ± this, in turns of the colour circle.", ge=0, le=0.5
    )
    blur: float = option(0.1, "Probability of a Gaussian blur.", ge=0, le=1)
    blur_sigma: list[float] = option(
        [0.1, 2.0], "Its sigma in pixels is drawn from this range.", gt=0, le=100
    )
    noise: float = option(0.1, "Probability of Gaussian noise.", ge=0, le=1)
    noise_std: float = option(0.05, "Its standard deviation, of the value range 0-1.", ge=0, le=1)
    mixup: float = option(0.0, "Probability that a batch is mixed by MixUp.", ge=0, le=1)
    mixup_alpha: float = option(0.4, "Beta(alpha, alpha) draws the share.", gt=0, le=1000)
    cutmix: float = option(0.0, "Probability that a batch is mixed by CutMix.", ge=0, le=1)
    cutmix_alpha: float = option(1.0, "Beta(alpha, alpha) draws the area.", gt=0, le=1000)


# --------------------------------------------------------------------------------------- data


@dataclass
class DataConfig:
    """What every data source has."""

    name: str = option(REQUIRED, "Which source makes it.", choices=("shapes", "folder"))
    num_classes: int = option(
        REQUIRED, "Classes that are predicted; ignored pixels are none.", ge=2, le=255
    )
    class_names: list[str] | None = option(None, "One a class; null: class_0, class_1, …")
    class_colors: list[list[int]] | None = option(
        None, "One RGB triple a class; null: distinct hues."
    )
    background: int | None = option(None, "Class that the foreground scores leave out.", ge=0)
    fit: str = option(
        "stretch",
        "How an image meets image_size. stretch: resized to it. pad: resized to fit inside, rest "
        "ignored. crop: random crops in training, a sliding window in evaluation.",
        choices=("stretch", "pad", "crop"),
    )
    mean: list[float] = option([0.485, 0.456, 0.406], "Subtracted from RGB in 0-1.", ge=0, le=1)
    std: list[float] = option([0.229, 0.224, 0.225], "Divides RGB in 0-1.", ge=0.001)
    check: str = option(
        "full",
        "Pre-flight: full opens every file (remembered until the files change), sample a hundred, "
        "off none.",
        choices=("full", "sample", "off"),
    )
    on_bad_sample: str = option(
        "fail",
        "An image or mask that cannot be read. fail: the run ends and names it. skip: it is told once; in training "
        "another image takes its place, in evaluation it counts nowhere.",
        choices=("fail", "skip"),
    )
    cache: str = option(
        "none",
        "Decoded images are kept. ram: in memory, made at every start. disk: in data.cache_dir, made once "
        "until files change.",
        choices=("none", "ram", "disk"),
    )
    cache_dir: str | None = option(
        None, "Folder of data.cache=disk; null: ~/.cache/segfit ($XDG_CACHE_HOME/segfit)."
    )


@dataclass
class ShapesConfig(DataConfig):
    """Built-in textured phantoms: no files, deterministic by index."""

    name: str = "shapes"
    num_classes: int = 4
    train_size: int = option(512, "Images to train on.", ge=1, le=10_000_000)
    val_size: int = option(64, "Held-out images.", ge=1, le=10_000_000)
    test_size: int = option(64, "Held-out images that no choice is made on.", ge=1, le=10_000_000)
    resolution: int = option(128, "Side of the drawn image in pixels.", ge=32, le=16384)
    data_seed: int = option(0, "Another seed, another data set.", ge=0)


@dataclass
class SplitConfig:
    """How images without train/val/test folders are divided."""

    val: float = option(0.2, "Share of the groups that is held out for validation.", gt=0, lt=1)
    test: float = option(0.0, "Share that is held out for testing.", ge=0, lt=1)
    seed: int = option(0, "Another seed, another split.", ge=0)
    group: str | None = option(
        None,
        "Regex on the file's relative name; images whose first group (or match) agrees stay together.",
    )


@dataclass
class FolderConfig(DataConfig):
    """Images and masks in folders, with or without train/, val/ and test/ above them."""

    name: str = "folder"
    root: str = option(REQUIRED, "The folder that holds images and masks.")
    images: str = option("images", "Folder of the images, below root or root/<split>.")
    masks: str = option("masks", "Folder of the masks (or the CSV file of mask_format=rle).")
    mask_format: str = option(
        "png",
        "png: one index or palette mask an image. parts: CelebAMask-HQ's one file a part. "
        "rle: a CSV of run-lengths (id, class, segmentation), as UW-Madison's.",
        choices=("png", "parts", "rle"),
    )
    ignore_index: int | None = option(
        255, "Mask value that counts nowhere; null: none.", ge=0, le=65535
    )
    # Any: OmegaConf cannot merge a typed map that is None with what is typed on the command line
    label_map: Any = option(
        None, "Mask value → class (or ignore_index); values that it does not name are an error."
    )
    image_mode: str = option(
        "rgb", "rgb, or gray: one channel, 8 or 16 bit, repeated to three.", choices=("rgb", "gray")
    )
    window: list[float] | None = option(
        None,
        "Percentiles of each grey image that become black and white, e.g. [1, 99].",
        ge=0,
        le=100,
    )
    split: SplitConfig = field(default_factory=SplitConfig)


# -------------------------------------------------------------------- loss, optimizer, scheduler


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
    balance: float = option(
        0.5, "Exponent of the inverse pixel share that balanced weights by.", ge=0, le=1
    )
    label_smoothing: float = option(0.0, "Of the cross-entropy.", ge=0, lt=1)
    region_weight: float = option(
        0.5, "Share of dice/lovasz in dice_ce/lovasz_ce; ce has the rest.", ge=0, le=1
    )
    focal_gamma: float = option(2.0, "Focusing (Lin et al., arXiv 1708.02002).", ge=0, le=100)
    tversky_alpha: float = option(
        0.3, "Weight of false positives (arXiv 1706.05721).", ge=0, le=1000
    )
    tversky_beta: float = option(0.7, "Weight of false negatives.", ge=0, le=1000)


@dataclass
class OptimizerConfig:
    """timm's optimizer factory."""

    name: str = option("adamw", "Any name from timm.optim.list_optimizers().")
    weight_decay: float = option(0.01, "Not applied to biases and norms.", ge=0, le=1000)
    momentum: float = option(0.9, "Of SGD and its kin.", ge=0, lt=1)
    betas: list[float] | None = option(
        None, "Of Adam and its kin; null: the optimizer's own.", ge=0, lt=1
    )
    head_lr_factor: float = option(
        1.0, "Learning rate of newly made layers, times lr.", gt=0, le=1_000_000
    )


@dataclass
class SchedulerConfig:
    """timm's scheduler factory, stepped every update."""

    name: str = option("none", "Decay after warm-up.", choices=("none", "cosine", "poly", "step"))
    warmup: float = option(0.0, "Share of all updates in which lr rises linearly.", ge=0, lt=1)
    warmup_factor: float = option(0.01, "First learning rate, as a share of lr.", gt=0, le=1)
    min_factor: float = option(0.0, "Last learning rate, as a share of lr.", ge=0, le=1)
    poly_power: float = option(0.9, "Exponent of poly.", gt=0, le=100)
    step_epochs: float = option(30.0, "Epochs between two drops of step.", gt=0)
    step_gamma: float = option(0.1, "Factor of a drop.", gt=0, le=1)


# ------------------------------------------------------------------------------ the run itself


@dataclass
class LoaderConfig:
    """Data workers."""

    workers: int | None = option(None, "Processes that read images; null: by cores.", ge=0, le=1024)
    prefetch: int = option(4, "Batches that each worker keeps ready.", ge=1, le=1024)
    pin_memory: bool = option(True, "Page-locked batches, so that copies to CUDA overlap.")
    persistent: bool = option(True, "Keep the workers between epochs.")
    non_blocking: bool = option(
        True, "Copy to CUDA one batch ahead, beside the step; false: the host waits for each copy."
    )


@dataclass
class CheckpointConfig:
    """What is kept of the training. The last and the best state always are."""

    every_minutes: float | None = option(10.0, "Also save inside an epoch, this often.", gt=0)
    every_steps: int | None = option(None, "Also save every so many updates.", ge=1)


@dataclass
class ReportConfig:
    """What is told, where."""

    log_every: int = option(20, "Updates between two readings of loss and gradient norm.", ge=1)
    tensorboard: bool = option(True, "Write TensorBoard events.")
    panels: int = option(6, "Validation images shown with mask and prediction.", ge=0, le=64)


@dataclass
class RunConfig:
    """What training, evaluation and benchmarks share: everything that composes a run."""

    model: ModelConfig = REQUIRED
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = REQUIRED
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    batch_size: int = option(
        REQUIRED, "Images a micro-batch; effective batch = × accumulate.", ge=1, le=65536
    )
    accumulate: int = option(1, "Micro-batches an update.", ge=1, le=65536)
    image_size: Any = option(REQUIRED, "What the model sees: side in pixels, or [height, width].")
    epochs: int = option(REQUIRED, "Passes over the training images.", ge=1)
    lr: float = option(REQUIRED, "Peak learning rate.", gt=0, le=1_000_000)
    seed: int = option(0, "Seeds weights, order, augmentation and dropout.", ge=0)

    device: str = option("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda"))
    channels_last: bool = option(True, "NHWC memory; faster for convolutions.")
    compile: bool = option(False, "torch.compile, probed; falls back to eager and says why.")
    deterministic: bool = option(False, "Bitwise repeatable on CUDA too, at some cost.")
    clip_grad_norm: float | None = option(1.0, "Clip the gradient's norm; null: never.", gt=0)
    ema_decay: float | None = option(
        None, "Evaluate and keep an exponential moving average of the weights.", gt=0, lt=1
    )
    val_every: int = option(
        1, "Epochs between two validations; the last epoch always has one.", ge=1
    )
    monitor: str = option(
        "miou",
        "Score that picks the best checkpoint.",
        choices=("miou", "macro_f1", "foreground_f1", "foreground_iou", "pixel_accuracy"),
    )
    patience: int | None = option(None, "Stop after so many validations without a new best.", ge=1)
    max_steps: int | None = option(
        None, "Stop after so many updates; the schedule stays that of epochs.", ge=1
    )
    max_left_out: int = option(
        5,
        "Updates with a loss or gradient that is not finite that are left out, after going back to the last good "
        "state, before training stops; 0: stop at the first.",
        ge=0,
    )
    limit_train_batches: int | None = option(None, "Micro-batches an epoch, at the most.", ge=1)
    limit_val_batches: int | None = option(None, "Batches a validation, at the most.", ge=1)
    resume: str | None = option(
        None, "A run folder; its config goes on, but for values given here."
    )
    resume_sweep: str | None = option(
        None, "A sweep's folder, for train.py alone; what is missing of it runs."
    )


@dataclass
class EvaluateConfig:
    """evaluate.py: everything about model and data comes from the run."""

    run: str = option(REQUIRED, "A run folder of train.py.")
    split: str = option("val", "Which part of the run's data.", choices=("train", "val", "test"))
    images: str | None = option(None, "A folder of images to predict instead; no masks needed.")
    out: str | None = option(
        None,
        "Where results go; null: <run>/evaluation/<split>, or images-<name of the folder of images>.",
    )
    export: str | None = option(
        None, "Write the model to this .pt2 file instead: a program that needs torch alone."
    )
    root: str | None = option(None, "Read the data set from here instead of the run's data.root.")
    checkpoint: str = option("best", "Which state of the run.", choices=("best", "last"))
    batch_size: int | None = option(None, "Images a batch; null: the run's.", ge=1)
    workers: int | None = option(None, "Data workers; null: by cores.", ge=0)
    device: str = option("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda"))
    precision: PrecisionConfig | None = option(
        None, "auto, fp32, fp16 or bf16; null: the one that the run used."
    )
    flip: bool = option(False, "Average with the prediction of the mirrored image.")
    sliding_window: bool = option(
        False, "Predict at full resolution in windows of image_size; always on for data.fit=crop."
    )
    overlap: float = option(0.5, "Share of a window that the next one covers again.", ge=0, lt=1)
    save_masks: bool = option(True, "Write predicted masks and overlays, at the original size.")
    worst: int = option(8, "How many of the worst images are shown as pictures.", ge=0)


SCHEMAS: dict[str, dict[str, type]] = {
    "model": {"segformer": SegFormerConfig, "cnn": CnnConfig, "timm_unet": TimmUnetConfig},
    "data": {"shapes": ShapesConfig, "folder": FolderConfig},
}


def register() -> None:
    """Give Hydra the schemas: names that the YAML files extend."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=RunConfig)
    store.store(name="evaluate_schema", node=EvaluateConfig)
    for group, schemas in SCHEMAS.items():
        for name, schema in schemas.items():
            store.store(group=group, name=f"{name}_schema", node=schema)
