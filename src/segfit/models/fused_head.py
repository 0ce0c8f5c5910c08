"""Resizing, sum, batch norm, ReLU and dropout of SegFormer's head in few passes over memory, in Triton.

The sum over stages is never written: it is worked out anew wherever it is needed, from maps of which all but the first are
small. Forward writes the result alone; backward writes the gradient of the sum, which products shrink to each map.
Importing this needs Triton, which torch for CUDA brings on Linux.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from segfit.models.layers import shrink_by_products, sum_by_products

# Of a block: pixels in a row, and channels, of which 64 are 128 bytes in half precision.
PIXELS, CHANNELS = tl.constexpr(16), tl.constexpr(64)

# A program of each kernel takes a row of pixels and a block of channels. `maps` are (B, H, W, D), (B, h, w, D), …,
# `sizes` their heights and widths, `depth` is D; without types, as Triton has them.


@triton.jit
def _taps(place, length, size):
    """Return both cells that a place is interpolated from, and the share of the second."""
    at = tl.maximum((place + 0.5) * (length / size) - 0.5, 0.0)
    low = tl.minimum(at.to(tl.int32), length - 1)
    return low, tl.minimum(low + 1, length - 1), at - low


@triton.jit
def _summed(maps, sizes, depth, line, x, channel):
    """Return the sum of all maps in a block of pixels and channels, which of it is there, and where it lies."""
    height, width = sizes[0]
    there = (x < width)[:, None] & (channel < depth)[None, :]
    place = (line.to(tl.int64) * width + x)[:, None] * depth + channel
    total = tl.load(maps[0] + place, there, 0.0).to(tl.float32)
    for i in tl.static_range(1, len(maps)):
        h, w = sizes[i]
        top, bottom, down = _taps(line % height, h, height)
        left, right, across = _taps(x, w, width)
        image = maps[i] + (line // height).to(tl.int64) * h * w * depth
        left, right = (left * depth)[:, None] + channel, (right * depth)[:, None] + channel
        a = tl.load(image + top * w * depth + left, there, 0.0).to(tl.float32)
        b = tl.load(image + top * w * depth + right, there, 0.0).to(tl.float32)
        c = tl.load(image + bottom * w * depth + left, there, 0.0).to(tl.float32)
        d = tl.load(image + bottom * w * depth + right, there, 0.0).to(tl.float32)
        upper = a + (b - a) * across[:, None]
        lower = c + (d - c) * across[:, None]
        total += upper + (lower - upper) * down
    return total, there, place


@triton.jit
def _moments(maps, sizes, depth, means, squares):
    """Write mean and sum of squared deviations of each row, `(B·H, D)`; blocks are merged as by Chan et al., 1983."""
    line, channel = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    width = sizes[0][1]
    mean, square = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, width, PIXELS):
        x = start + tl.arange(0, PIXELS)
        total, there, _ = _summed(maps, sizes, depth, line, x, channel)
        count = tl.minimum(width - start, PIXELS).to(tl.float32)
        here = tl.sum(tl.where(there, total, 0.0), 0) / count
        off = tl.where(there, total - here, 0.0)
        share = count / (start + count)
        square += tl.sum(off * off, 0) + (here - mean) * (here - mean) * start * share
        mean += (here - mean) * share
    tl.store(means + line * depth + channel, mean, channel < depth)
    tl.store(squares + line * depth + channel, square, channel < depth)


@triton.jit
def _forward(maps, sizes, depth, mean, scale, bias, seed, out, p):
    """Write the result `(B, H, W, D)`; without a seed nothing is dropped."""
    line, channel = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    width = sizes[0][1]
    mean = tl.load(mean + channel, channel < depth, 0.0)
    scale = tl.load(scale + channel, channel < depth, 0.0)
    bias = tl.load(bias + channel, channel < depth, 0.0)
    for start in range(0, width, 4 * PIXELS):
        x = start + tl.arange(0, PIXELS)
        if seed is not None:  # a call of the generator gives four numbers
            number = (line.to(tl.int64) * width + x)[:, None] * depth + channel
            draws = tl.rand4x(tl.load(seed), number)
        for block in tl.static_range(4):
            place_x = x + block * PIXELS
            total, there, place = _summed(maps, sizes, depth, line, place_x, channel)
            y = tl.maximum((total - mean) * scale + bias, 0.0)
            if seed is not None:
                y = tl.where(draws[block] >= p, y / (1 - p), 0.0)
            tl.store(out + place, y.to(out.dtype.element_ty), there)


@triton.jit
def _backward(maps, sizes, depth, mean, slope, scale, shift, out, grad, sums, products, result, p):
    """Write the gradient of the sum of all maps, `(B, H, W, D)`: `scale · g - shift - slope · (sum - mean)`.

    g is the gradient behind dropout and ReLU. Without a result, each row's sums of g and g · (sum - mean), `(B·H, D)`.
    """
    line, channel = tl.program_id(0), tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean = tl.load(mean + channel, channel < depth, 0.0)
    slope = tl.load(slope + channel, channel < depth, 0.0)
    scale = tl.load(scale + channel, channel < depth, 0.0)
    shift = tl.load(shift + channel, channel < depth, 0.0)
    plain, scaled = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, sizes[0][1], PIXELS):
        x = start + tl.arange(0, PIXELS)
        total, there, place = _summed(maps, sizes, depth, line, x, channel)
        g = tl.load(grad + place, there, 0.0).to(tl.float32) / (1 - p)
        g = tl.where(tl.load(out + place, there, 0.0) > 0, g, 0.0)  # what was let through
        if result is None:
            plain += tl.sum(g, 0)
            scaled += tl.sum(g * (total - mean), 0)
        else:
            g = g * scale - shift - (total - mean) * slope
            tl.store(result + place, g.to(result.dtype.element_ty), there)
    if result is None:
        tl.store(sums + line * depth + channel, plain, channel < depth)
        tl.store(products + line * depth + channel, scaled, channel < depth)


class _Fused(torch.autograd.Function):
    """Maps `(B, h_i, w_i, D)`, contiguous, → the result `(B, H, W, D)`, and mean and variance `(D,)` of their sum."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, bias: Tensor, eps: float, p: float, *maps: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, height, width, depth = maps[0].shape
        means, squares = maps[0].new_empty(2, batch * height, depth, dtype=torch.float32)
        _launch(_moments, maps, means, squares)
        mean = means.mean(0)
        means -= mean
        variance = squares.addcmul_(means, means, value=width).mean(0) / width
        deviation = (variance + eps).rsqrt()
        scale = weight * deviation
        out = torch.empty_like(maps[0])
        # drawn by torch, on the device: a run's seed decides, and nothing waits
        seed = torch.randint(2**31, (1,), device=out.device) if p > 0 else None
        _launch(_forward, maps, mean, scale, bias, seed, out, p)
        ctx.save_for_backward(mean, deviation, scale, out, *maps)
        ctx.p = p
        ctx.mark_non_differentiable(mean, variance)
        return out, mean, variance

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mean, deviation, scale, out, *maps = ctx.saved_tensors
        gradient = grads[0].contiguous()
        batch, height, width, depth = out.shape
        rows = out.new_empty(2, batch * height, depth, dtype=torch.float32)
        _launch(_backward, maps, *[mean] * 4, out, gradient, *rows, None, ctx.p)
        bias, weight = rows.sum(1)
        weight *= deviation
        shrunk, result = scale / (batch * height * width), torch.empty_like(out)
        vectors = mean, weight * deviation * shrunk, scale, bias * shrunk
        _launch(_backward, maps, *vectors, out, gradient, *rows, result, ctx.p)
        sizes = [one.shape[1:3] for one in maps[1:]]
        return weight, bias, None, None, result, *shrink_by_products(result, sizes)


def _launch(kernel: Any, maps: Sequence[Tensor], *arguments: Any) -> None:
    batch, height, _, depth = maps[0].shape
    sizes = tuple(tuple(one.shape[1:3]) for one in maps)
    with torch.cuda.device_of(maps[0]):
        grid = (batch * height, triton.cdiv(depth, CHANNELS.value))
        kernel[grid](tuple(maps), sizes, depth, *arguments)


def sum_norm_relu_dropout(maps: Sequence[Tensor], norm: nn.BatchNorm2d, p: float) -> Tensor:
    """Return what `norm`, in training, ReLU and dropout make of the sum of maps at the first one's size.

    The maps are `(B, D, h_i, w_i)`, all of one type, and summed in fp32; the result is `(B, D, H, W)` of their type, channels
    last. The norm's running statistics and count of batches change as in its own forward. An element is dropped with
    probability `p`; those kept grow by 1 / (1 - p).
    """
    tokens = [one.permute(0, 2, 3, 1).contiguous() for one in maps]
    out, mean, variance = _Fused.apply(norm.weight, norm.bias, norm.eps, p, *tokens)
    if norm.running_mean is not None and norm.running_var is not None:
        assert norm.momentum is not None
        assert norm.num_batches_tracked is not None
        count = out.numel() // out.shape[-1]
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
    return out.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def in_steps(maps: Sequence[Tensor], norm: nn.BatchNorm2d, _: float = 0.0) -> Tensor:
    """Return the same without dropout, by products and torch's own kernels."""
    return F.relu_(norm(sum_by_products(maps)))


_decided: dict[Any, bool] = {}


def pay(maps: Sequence[Tensor], norm: nn.BatchNorm2d) -> bool:
    """Say whether the kernels give what products do, in less time: tried once for a device, a type and a depth.

    Arguments as those of `sum_norm_relu_dropout`, on CUDA. Trying takes two images, and seconds where Triton has not compiled
    for this card before. It waits for the device and leaves its generator alone.
    """
    key = maps[0].device, maps[0].dtype, maps[0].shape[1]
    if key not in _decided:
        with torch.autocast(maps[0].device.type, enabled=False), torch.enable_grad():
            try:
                _decided[key] = _equal_and_faster([one.detach()[:2] for one in maps], norm)
            except Exception:  # no C compiler for the launcher, an old Triton, no memory left, …
                _decided[key] = False
    return _decided[key]


def _equal_and_faster(maps: Sequence[Tensor], norm: nn.BatchNorm2d) -> bool:
    def run(work: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return a result without dropout, and the gradients for some gradient of it."""
        own = copy.deepcopy(norm).to(torch.promote_types(dtype, torch.float32))
        leaves = [one.to(dtype).requires_grad_() for one in maps]
        out = work(leaves, own, 0.0)
        return [out, *torch.autograd.grad(out, [*leaves, own.weight, own.bias], leaves[0])]

    kinds, dtype = (sum_norm_relu_dropout, in_steps), maps[0].dtype
    for fused, steps, exact in zip(
        *(run(one, dtype) for one in kinds), run(in_steps, torch.float64), strict=True
    ):
        off, allowed = (fused - exact).norm(), 2 * (steps - exact).norm() + 1e-4 * exact.norm()
        if not off <= allowed:
            return False
    timers = [Timer("run(*what)", globals={"run": run, "what": (one, dtype)}) for one in kinds]
    kernels, products = (min(timer.timeit(10).mean for _ in range(3)) for timer in timers)
    return kernels < products
