"""Loss or gradient that is not finite: what it is, and the batch that did it."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import Tensor
from torch.nn.utils import get_total_norm

from segfit.engine.checkpoint import write_tensors
from segfit.engine.task import Batch


class NotFinite(Exception):  # noqa: N818 - an event of the training, which knows what to do
    """`args[0]` says what is not finite."""


class HalfMoved(NotFinite):
    """Some weights were moved by an update and some were not, since memory ran out: no number is to blame."""


def describe(loss: float, norm: float, scale: float) -> str | None:
    """Return what is not finite about an update, or None.

    A gradient that overflows while the loss is scaled up is the scaler's business, which skips the update and lowers
    the scale; only one that overflows unscaled is a fault.

    Args:
        loss: of the update.
        norm: of its gradient, unscaled.
        scale: of the loss, 1.0 outside fp16.
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(norm) and scale <= 1.0:
        return f"gradient's norm is {norm}"
    return None


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Say whether all floating-point ones of some tensors are finite, and so is their norm; synchronises."""
    norm = get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()])
    return bool(norm.isfinite())


def save_window(
    path: Path, window: Sequence[Batch], names: Sequence[Sequence[str]], found: str
) -> None:
    """Save the micro-batches of an update with their names, as they came from the data: to look at.

    `torch.load(path, weights_only=True)` reads it: {"found": str, "batches": [{"names": [str], key: tensor}]}.

    Args:
        path: the file; its folder is made.
        window: micro-batches, wherever they lie.
        names: of the samples of each.
        found: what was not finite.

    Raises:
        OSError: if it cannot be written.
    """
    batches = [
        {"names": list(known), **{key: tensor.cpu() for key, tensor in batch.items()}}
        for batch, known in zip(window, names, strict=True)
    ]
    write_tensors({"found": found, "batches": batches}, path)
