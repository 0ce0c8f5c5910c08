"""Losses, gradients and weights that are not finite."""

import math
from collections.abc import Iterable

from torch import Tensor
from torch.nn.utils import get_total_norm


class NotFinite(Exception):  # noqa: N818 - the training can recover from it
    """`args[0]` says what is not finite."""


def describe(loss: float, norm: float, scale: float) -> str | None:
    """Return what is not finite about an update, or None.

    A gradient that overflows while the loss is scaled up (`scale`, 1.0 outside fp16) is no fault: GradScaler skips the
    update and lowers the scale. One that overflows unscaled is. `norm` is that of the unscaled gradient.
    """
    if not math.isfinite(loss):
        return f"loss is {loss}"
    if not math.isfinite(norm) and scale <= 1.0:
        return f"gradient's norm is {norm}"
    return None


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether all floating-point tensors among `tensors`, and their common norm, are finite; synchronises."""
    norm = get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()])
    return bool(norm.isfinite())
