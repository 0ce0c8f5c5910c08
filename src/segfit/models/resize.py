"""Bilinear resizing and average pooling of feature maps: torch's kernels on a CPU, two matrix products on a card.

On CUDA, autocast runs `upsample_bilinear2d` in fp32, and its backward, like that of `adaptive_avg_pool2d`, adds atomically:
another sum each time. Both are linear in the rows and in the columns of a map. Products do the same deterministically,
and in the half precision of autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map `(B, C, h, w)` at `size` = (H, W), bilinear with `align_corners=False`, in its memory format.

    On CUDA under autocast, the result has autocast's type.
    """
    if x.device.type == "cuda":
        return by_products(x, size, "bilinear")
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def average_pool(x: Tensor, grid: int) -> Tensor:
    """Return the averages of a map `(B, C, h, w)` over a grid, `(B, C, grid, grid)`, as `F.adaptive_avg_pool2d`."""
    if x.device.type == "cuda":
        return by_products(x, (grid, grid), "average")
    return F.adaptive_avg_pool2d(x, grid)


def resize_and_sum(maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of all maps `(B, D, h_i, w_i)` at the size of the first, channels last."""
    if maps[0].device.type == "cuda":
        return sum_by_products(maps)
    first, second, *others = maps
    size = first.shape[2:]
    # Adding in place into a new tensor, which no backward reads, saves a pass over memory. Not into
    # `first`: it is a view of a linear layer's output, where autograd would copy gradients.
    out = resize(second, size)
    out += first
    for y in others:
        out += resize(y, size)
    return out


def sum_by_products(maps: Sequence[Tensor]) -> Tensor:
    """Return what `resize_and_sum` does, on any device; the products add what they make to the sum."""
    first, second, *others = maps
    batch, channels, height, width = first.shape
    rows = first.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    total = torch.baddbmm(rows, *_factors(second, (height, width), "bilinear"))
    for y in others:
        total.baddbmm_(*_factors(y, (height, width), "bilinear"))
    return total.view(batch, height, width, channels).permute(0, 3, 1, 2)


def shrink_by_products(gradient: Tensor, sizes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the gradients `(B, h_i, w_i, C)` of maps that were resized to that of their sum, `(B, H, W, C)`, which is read once."""
    batch, height, width, channels = gradient.shape
    across = torch.cat([_weights(gradient, w, width, "bilinear") for _, w in sizes], 1)
    halves = across.T @ gradient.view(batch * height, width, channels)
    found: list[Tensor] = []
    for half in halves.view(batch, height, -1, channels).split([w for _, w in sizes], 2):
        down = _weights(gradient, sizes[len(found)][0], height, "bilinear")
        found.append((down.T @ half.flatten(2)).unflatten(2, half.shape[2:]))
    return found


def by_products(x: Tensor, size: Sequence[int], kind: str) -> Tensor:
    """Return what `resize` ("bilinear") or `average_pool` ("average") do, on any device."""
    batch, channels, h, w = x.shape
    if x.stride(1) < x.stride(3):  # channels last
        rows = torch.bmm(*_factors(x, size, kind))
        return rows.view(batch, *size, channels).permute(0, 3, 1, 2)
    return _weights(x, h, size[0], kind) @ (x @ _weights(x, w, size[1], kind).T)


def _factors(x: Tensor, size: Sequence[int], kind: str) -> tuple[Tensor, Tensor]:
    """Return matrices `(B, H, h)` and `(B, h, W·C)` whose product is the result, channels last."""
    batch, channels, h, w = x.shape
    across, down = _weights(x, w, size[1], kind), _weights(x, h, size[0], kind)
    rows = across @ x.permute(0, 2, 3, 1).reshape(batch * h, w, channels)
    return down.expand(batch, -1, -1), rows.view(batch, h, size[1] * channels)


def _weights(x: Tensor, length: int, size: int, kind: str) -> Tensor:
    """Return the matrix `(size, length)` that resizes a dimension of `x`, in the type that products run in."""
    device, dtype = x.device, x.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if torch.compiler.is_compiling():  # into the graph
        return _make_weights.__wrapped__(length, size, kind, device, dtype, None)
    # Tensors without data (benchmark=plan) do not mix with those of another mode, nor do inference mode's with training.
    mode = getattr(x, "fake_mode", None), torch.is_inference_mode_enabled()
    return _make_weights(length, size, kind, device, dtype, mode)


@lru_cache(maxsize=64)  # a few sizes come back with every batch
def _make_weights(
    length: int, size: int, kind: str, device: torch.device, dtype: torch.dtype, _: object
) -> Tensor:
    cells = torch.arange(length, device=device, dtype=torch.float64)
    out = torch.arange(size, device=device, dtype=torch.float64)[:, None]
    if kind == "bilinear":  # a hat around the place that each result is read from
        place = ((out + 0.5) * (length / size) - 0.5).clamp(0, length - 1)
        weights = (1 - (cells - place).abs()).clamp_min(0)
    else:
        begin, end = (out * length / size).floor(), ((out + 1) * length / size).ceil()
        weights = ((cells >= begin) & (cells < end)) / (end - begin)
    return weights.to(dtype)
