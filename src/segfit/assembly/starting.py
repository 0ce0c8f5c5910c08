"""Weights of an earlier run to start from: what fits is taken, rows of the last layer by the names of their classes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from segfit.assembly.samples import Samples, read_samples
from segfit.config.check import flat, plain
from segfit.data.files import some
from segfit.engine.checkpoint import Checkpoints, load_checkpoint
from segfit.errors import SegFitError
from segfit.runs.folder import RunFolder, load_config


@dataclass(frozen=True)
class Start:
    """What `init` names."""

    path: Path  # the file
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any]  # of the run that they are from, by dotted keys
    samples: Samples  # of that run, if its folder is there


def read_start(init: str) -> Start:
    """Return the weights of a run's folder or of one of its .pt files; raise a SegFitError if they cannot be had."""
    path = Path(init).expanduser()
    if path.is_dir():
        folder = Checkpoints(
            RunFolder(path).checkpoints if RunFolder(path).config.is_file() else path
        )
        path = folder.best if folder.best.exists() else folder.last
    try:
        content = load_checkpoint(path)
        run = path.absolute().parent.parent
        about = content.get("about") or {"config": flat(plain(load_config(run)))}
        weights = dict(content.get("ema") or content["model"])
        return Start(path, weights, dict(about["config"]), read_samples(RunFolder(run).samples))
    except SegFitError as error:
        raise SegFitError([f"init={init}: {problem}" for problem in error.problems]) from error
    except (LookupError, TypeError, ValueError) as error:
        raise SegFitError(f"init={init}: {path} is no checkpoint of a run.") from error


def start_from(
    model: nn.Module, start: Start, config: Mapping[str, Any], notice: Callable[[str], None]
) -> list[str]:
    """Copy into the model of a config what fits of a start; report the rest, and return the names of what stays random.

    Raises a SegFitError if that is less than half of the numbers outside of the last layer.
    """
    rows, theirs = _classes(config), _classes(start.config)
    kept = [name for name in rows if name in theirs]
    taken, new = dict[str, Tensor](), list[str]()
    fitting = total = 0
    for name, own in model.state_dict().items():
        given, last = start.weights.get(name), bool(rows) and "classifier" in name.split(".")
        if not isinstance(given, Tensor):
            given = None
        elif last and given.shape == (len(theirs), *own.shape[1:]):
            merged = own.clone()
            merged[[rows.index(row) for row in kept]] = given[[theirs.index(row) for row in kept]]
            given = merged
        elif given.ndim == own.ndim == 4 and given.shape[1] == 3 != own.shape[1]:
            from timm.models import adapt_input_conv

            given = adapt_input_conv(own.shape[1], given)  # RGB there, bands here
        if given is not None and given.shape == own.shape:
            taken[name] = given
        else:
            new.append(name)
        if not last:
            fitting, total = fitting + own.numel() * (name in taken), total + own.numel()
    if 2 * fitting < total:
        raise SegFitError(
            f"init={start.path}: only {fitting:,} of {total:,} numbers fit: it holds a {start.config.get('model.name')} with "
            f"other options, or another model. Choose model and model.… as its run's config.yaml has them."
        )
    model.load_state_dict(taken, strict=False)
    changes = {
        "classes taken over": kept if rows != theirs else [],
        "new classes": [name for name in rows if name not in theirs],
        "classes that are gone": [name for name in theirs if name not in rows],
        "not in it, so random": new,
        "not used": sorted({*start.weights} - {*taken, *new}),
    }
    summary = [f"init={start.path}: {len(taken)} of {len(taken) + len(new)} tensors taken"]
    summary += [f"{what}: {some(names)}" for what, names in changes.items() if names]
    notice("; ".join(summary) + ".")
    return new


def _classes(config: Mapping[str, Any]) -> list[str]:
    """Return what the rows of the layers called classifier stand for; nothing for tasks without classes."""
    count = config.get("data.num_classes", 0)
    return config.get("data.class_names") or [f"class_{index}" for index in range(count)]
