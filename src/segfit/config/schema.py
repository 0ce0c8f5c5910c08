"""The schema of every config that SegFit composes: each option is documented where it is defined.

Hydra validates names and types when it composes; `segfit.config.check` validates choices, ranges and contradictions.
"""

from dataclasses import dataclass, field
from typing import Any

REQUIRED: Any = "???"  # OmegaConf's mark for a value that has to be given
DEVICE_HELP = "auto: cuda (NVIDIA, AMD by ROCm), else mps (Apple), else cpu. One card of several: CUDA_VISIBLE_DEVICES=0 python …."


def option(default: Any, help: str, *, empty: bool = False, **limits: Any) -> Any:
    """Return a dataclass field with its documentation and the values that `check` accepts.

    `limits` are choices, ge, gt, le and lt. `None` always passes where the annotation is Optional; a list is checked item by item,
    and may be empty only if `empty` is True.
    """
    metadata = {"help": help, "empty": empty, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# Which options have an effect, as (switch, its values, names beside it): only with one of these values, or with any but
# 0 and null where there are none.
USED = (
    ("precision.name", "auto fp16", "init_scale growth_interval"),
    ("scheduler.name", "cosine poly", "min_factor"),
    ("scheduler.name", "poly", "poly_power"),
    ("scheduler.name", "step", "step_epochs step_gamma"),
    ("scheduler.warmup", "", "warmup_factor"),
)


@dataclass
class ModelConfig:
    """What every model has."""

    name: str = option(REQUIRED, "Which builder makes it.")


@dataclass
class TunedForConfig:
    """What the measurements of benchmark=optimize hold for, as text; a difference is logged when training starts."""

    device: str = option(REQUIRED, "Its name, memory and, of a CPU, cores.")
    driver: str | None = option(None, "NVIDIA's; null on the CPU.")
    torch: str = option(REQUIRED, "Its version.")
    model: str = option(REQUIRED, "Choice of the group, and what was changed of it.")
    sample: str = option(REQUIRED, "Shape of what the model gets of a sample.")


@dataclass
class HardwareConfig:
    """The card that the recipe was made for. The recipe itself sets top-level options."""

    name: str = option(REQUIRED, "Tier: cpu, 4gb, 8gb, 12gb, 24gb, or local.")
    vram_gb: float | None = option(None, "Memory of the card, GiB; null for the CPU.", gt=0)
    note: str | None = option(None, "What hardware=auto changed of the recipe for this card.")
    tuned_for: TunedForConfig | None = option(None, "What benchmark=optimize measured it for.")


@dataclass
class PrecisionConfig:
    """Mixed precision."""

    name: str = option(
        "auto",
        "auto: bf16 where the device does it natively, fp16 with GradScaler on older CUDA cards, else fp32.",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    tf32: bool = option(True, "Let fp32 matrix products use TF32 on Ampere and later.")
    init_scale: float = option(65536.0, "GradScaler's first scale (fp16).", gt=0, le=1e30)
    growth_interval: int = option(2000, "Steps without overflow before the scale doubles.", ge=1)


@dataclass
class DataConfig:
    """What the data of every task have."""

    name: str = option(REQUIRED, "Which source makes it.")
    check: str = option(
        "full",
        "Pre-flight: full opens every file (remembered until the files change), sample a hundred, off none.",
        choices=("full", "sample", "off"),
    )
    on_bad_sample: str = option(
        "fail",
        "What cannot be read. fail: the run ends and names it. skip: in training another takes its place, in evaluation none.",
        choices=("fail", "skip"),
    )
    cache: str = option(
        "none",
        "Decoded images are kept. ram: in memory, made at every start. disk: in data.cache_dir, until files change.",
        choices=("none", "ram", "disk"),
    )
    cache_dir: str | None = option(None, "Of disk; null: ~/.cache/segfit ($XDG_CACHE_HOME/segfit).")


@dataclass
class SplitConfig:
    """How samples without train/val/test folders are divided."""

    val: float = option(0.2, "Share of the groups that is held out for validation.", gt=0, lt=1)
    test: float = option(0.0, "Share that is held out for testing.", ge=0, lt=1)
    seed: int = option(0, "Another seed, another split.", ge=0)
    group: str | None = option(
        None,
        "Regex on the file's relative name; samples whose first group (or match) agrees stay together.",
    )
    fold: int | None = option(
        None, "Hold out this fold instead, counted from 0: -m data.split.fold=0,1,2,3,4.", ge=0
    )
    folds: int | None = option(None, "Number of folds; null: 5.", ge=2)
    lists: str | None = option(
        None,
        "Folder below data.root of train.txt, val.txt and perhaps test.txt, a name a line, that divide instead (as in VOC).",
    )


@dataclass
class OptimizerConfig:
    """timm's optimizer factory."""

    name: str = option("adamw", "Any name from timm.optim.list_optimizers().")
    weight_decay: float = option(0.01, "Not applied to biases and norms.", ge=0, le=1000)
    momentum: float = option(0.9, "Of SGD and the like.", ge=0, lt=1)
    betas: list[float] | None = option(None, "Of Adam; null: the optimizer's own.", ge=0, lt=1)
    head_lr_factor: float = option(1.0, "Times lr: that of new layers.", gt=0, le=1_000_000)
    layer_decay: float = option(
        1.0,
        "Learning rate of a layer of the encoder, times that of the next one (BEiT, arXiv 2106.08254); 0.75 for transformers.",
        ge=0.01,
        le=1,
    )


@dataclass
class SchedulerConfig:
    """timm's scheduler factory, stepped every update."""

    name: str = option("none", "Decay after warm-up.", choices=("none", "cosine", "poly", "step"))
    warmup: float = option(0.0, "Share of all updates in which lr rises linearly.", ge=0, lt=1)
    warmup_factor: float = option(0.01, "First learning rate, as a share of lr.", gt=0, le=1)
    min_factor: float = option(0.0, "Last learning rate, as a share of lr.", ge=0, le=1)
    poly_power: float = option(0.9, "Exponent of poly.", gt=0, le=100)
    step_epochs: float = option(30.0, "Epochs between two drops of step.", gt=0, le=1_000_000)
    step_gamma: float = option(0.1, "Factor of a drop.", gt=0, le=1)


@dataclass
class LoaderConfig:
    """Data workers."""

    workers: int | None = option(None, "Processes that read images; null: by cores.", ge=0, le=1024)
    prefetch: int = option(4, "Batches that each worker keeps ready.", ge=1, le=1024)
    pin_memory: bool = option(True, "Page-locked batches, so that copies to CUDA overlap.")
    persistent: bool = option(True, "Keep the workers between epochs.")
    non_blocking: bool = option(True, "Copy to CUDA beside the step; false: wait for each copy.")


@dataclass
class CheckpointConfig:
    """What is kept of the training. The last and the best state always are."""

    every_minutes: float | None = option(10.0, "Also save inside an epoch, this often.", gt=0)
    every_steps: int | None = option(None, "Also save every so many updates.", ge=1)


@dataclass
class MetricsConfig:
    """Scores besides the task's own."""

    extra: list[Any] | None = option(
        None,
        "Metrics of torchmetrics, e.g. [torchmetrics.segmentation.HausdorffDistance]; with arguments: "
        "[{name: torchmetrics.…, distance_metric: chessboard}]. evaluate.py takes the run's for null.",
        empty=True,
    )


@dataclass
class ReportConfig:
    """What is reported, where."""

    log_every: int = option(20, "Updates between two readings of loss and gradient norm.", ge=1)
    logger: list[str] = option(
        ["tensorboard"],
        "Where the numbers of training go besides log and console; []: nowhere. wandb is offline unless WANDB_MODE is set.",
        choices=("tensorboard", "csv", "wandb", "mlflow"),
        empty=True,
    )
    tensorboard: bool = option(True, "false: leave tensorboard out of `logger`.")
    page: bool = option(True, "Write report.html with curves and pictures into the run's folder.")
    panels: int = option(6, "Validation images shown with mask and prediction.", ge=0, le=64)


@dataclass
class TaskConfig:
    """What is learnt: a folder of src/segfit/tasks."""

    name: str = option(REQUIRED, "The folder's name.")


@dataclass
class RunConfig:
    """What training, evaluation and benchmarks of every task share; a task's `schema.Run` adds its own."""

    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = REQUIRED
    hardware: HardwareConfig = field(default_factory=HardwareConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = REQUIRED
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    batch_size: int = option(REQUIRED, "Images a micro-batch.", ge=1, le=65536)
    accumulate: int = option(1, "Micro-batches an update (× batch_size).", ge=1, le=65536)
    epochs: int = option(REQUIRED, "Passes over the training images.", ge=1)
    lr: float = option(REQUIRED, "Peak learning rate.", gt=0, le=1_000_000)
    seed: int = option(0, "Seeds weights, order, augmentation and dropout.", ge=0)

    device: str = option("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda", "mps"))
    channels_last: bool = option(True, "NHWC memory; faster for convolutions.")
    compile: bool = option(False, "torch.compile, probed; falls back to eager and says why.")
    compile_mode: str = option(
        "default",
        "reduce-overhead: with compile=true on CUDA, a pass is launched as a whole (CUDA graphs). For small batches; takes memory.",
        choices=("default", "reduce-overhead"),
    )
    deterministic: bool = option(
        False,
        "The same bits in every run on CUDA too, as far as torch has such kernels (it warns of others). Slower; attention takes more memory.",
    )
    clip_grad_norm: float | None = option(1.0, "Clip the gradient's norm; null: never.", gt=0)
    ema_decay: float | None = option(None, "Evaluate and keep an EMA of the weights.", gt=0, lt=1)
    val_every: int = option(1, "Epochs between validations; the last always has one.", ge=1)
    monitor: str = option(REQUIRED, "Score that picks the best checkpoint.")
    patience: int | None = option(None, "Stop after so many validations without a new best.", ge=1)
    max_steps: int | None = option(None, "Stop then; the schedule stays that of epochs.", ge=1)
    max_left_out: int = option(
        5,
        "Updates whose loss or gradient is not finite that are left out, from the last good state, before training stops; 0: none.",
        ge=0,
    )
    limit_train_batches: int | None = option(None, "Micro-batches an epoch, at the most.", ge=1)
    limit_val_batches: int | None = option(None, "Batches a validation, at the most.", ge=1)
    name: str | None = option(None, "Folder below outputs (of a sweep: multirun); null: by date.")
    init: str | None = option(
        None,
        "Start from an earlier run's weights: its folder or a .pt of it. Classes are matched by name; misfits are reported.",
    )
    freeze: str | None = option(
        None,
        "What is not trained, its norms and dropout as in evaluation: encoder, or a regex that parameters' names begin with.",
    )
    freeze_epochs: int | None = option(None, "After them it is trained, too.", ge=1)
    resume: str | None = option(
        None,
        "A run folder to resume, with its config but for what is given here; last: the newest.",
    )
    resume_sweep: str | None = option(None, "A sweep's folder (train.py): what is missing runs.")


@dataclass
class EvaluateConfig:
    """evaluate.py: everything about model and data comes from the run."""

    # Any: a folder or several
    run: Any = option(
        REQUIRED,
        "A run folder of train.py; last: the newest below outputs. Several, '[a,b,c]': their probabilities are averaged.",
    )
    split: str = option("val", "Which part of the run's data.", choices=("train", "val", "test"))
    out: str | None = option(None, "Where results go; null: below <run>/evaluation.")
    export: str | None = option(
        None,
        "Write the model instead: to a .pt2 or .onnx, which need no SegFit; a SegFormer to hf:<folder>, for transformers.",
    )
    push: str | None = option(None, "Upload export=hf:… to the Hugging Face hub (owner/name).")
    root: str | None = option(None, "Read the data set from here instead of the run's data.root.")
    bootstrap: int = option(
        1000,
        "Resamples of the images, or of the groups of data.split.group, for 95 % intervals of the scores; 0: none.",
        ge=0,
        le=100_000,
    )
    compare: str | None = option(None, "Another run on the same samples: differences and p.")
    checkpoint: str = option("best", "Which state of the run.", choices=("best", "last"))
    batch_size: int | None = option(None, "Images a batch; null: the run's.", ge=1)
    workers: int | None = option(None, "Data workers; null: by cores.", ge=0)
    device: str = option("auto", DEVICE_HELP, choices=("auto", "cpu", "cuda", "mps"))
    precision: PrecisionConfig | None = option(None, "auto, fp32, fp16, bf16; null: the run's.")
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
