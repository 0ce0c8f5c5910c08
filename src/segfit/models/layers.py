"""What torch's own layers do, done faster: resizing and pooling on a card, linear layers and dropout on a CPU.

On CUDA, autocast runs `upsample_bilinear2d` in fp32, and its backward, like those of bicubic resizing and of
`adaptive_avg_pool2d`, adds atomically: another sum each time. All are linear in the rows and in the columns of a map. Two
matrix products do the same deterministically, and in the half precision of autocast.
"""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.system.hardware import cpu_vendor

LEVELS = 2**16  # a mask costs 16 random bits an element, so the rate is a multiple of 1 / LEVELS
PIECE = 2**20  # elements masked at a time: a piece of mask stays in the cache and costs no memory
# Pixels from which on a 1×1 convolution gives the weight's gradient faster than a product.
MANY = 4096


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map `(B, C, h, w)` at `size` = (H, W), bilinear with `align_corners=False`, in its memory format.

    Under autocast, on CUDA and in code compiled for a CPU, the result has autocast's type.
    """
    if _products_pay(x):
        return by_products(x, size, "bilinear")
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def resize_embeddings(
    x: Tensor, size: Sequence[int], mode: str, antialias: bool = False, **options: Any
) -> Tensor:
    """Return what `F.interpolate` does to embeddings of positions `(1, C, h, w)`, on CUDA by products in fp32."""
    if x.device.type != "cuda" or mode != "bicubic" or not antialias:
        return F.interpolate(x, size, mode=mode, antialias=antialias, **options)
    with torch.autocast("cuda", enabled=False), without_tf32():
        return by_products(x, size, "bicubic")


def average_pool(x: Tensor, grid: int) -> Tensor:
    """Return the averages of a map `(B, C, h, w)` over a grid, `(B, C, grid, grid)`, as `F.adaptive_avg_pool2d`."""
    if x.device.type == "cuda":
        return by_products(x, (grid, grid), "average")
    return F.adaptive_avg_pool2d(x, grid)


def resize_and_sum(maps: Sequence[Tensor]) -> Tensor:
    """Return the sum of all maps `(B, D, h_i, w_i)` at the size of the first, channels last."""
    if _products_pay(maps[0]):
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


def _products_pay(x: Tensor) -> bool:
    """Return whether a map is resized by products: on CUDA, and in code compiled for a CPU, whose own resizing is scalar.

    An export keeps the operation, since products fix the size, and so do Apple's GPUs, which lack float64 for the weights.
    """
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    return x.device.type == "cuda" or (x.device.type == "cpu" and compiled)


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
    """Return what `resize` ("bilinear"), `resize_embeddings` ("bicubic") or `average_pool` ("average") do, on any device."""
    batch, channels, h, w = x.shape
    if x.stride(1) < x.stride(3):  # channels last
        rows = torch.bmm(*_factors(x, size, kind))
        return rows.view(batch, *size, channels).permute(0, 3, 1, 2)
    return _weights(x, h, size[0], kind) @ (x @ _weights(x, w, size[1], kind).T)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keep TF32, and its 10 bits of mantissa, out of the products of fp32 weights that are made inside; compiled code does not set it."""
    if torch.compiler.is_compiling():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


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
    elif kind == "bicubic":
        # Keys's kernel, a = -0.5, as wide as a result's pixel where the map shrinks.
        place = (out + 0.5) * (length / size) - 0.5
        x = ((cells - place) / max(length / size, 1)).abs()
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, near, far * (x < 2))
        weights = weights / weights.sum(1, keepdim=True)
    else:
        begin, end = (out * length / size).floor(), ((out + 1) * length / size).ceil()
        weights = ((cells >= begin) & (cells < end)) / (end - begin)
    return weights.to(dtype)


@cache
def onednn_multiplies_faster() -> bool:
    """Say whether fp32 products should go through oneDNN instead of MKL.

    torch's `F.linear` calls MKL in fp32, which runs AVX2 code on processors that are not Intel's. oneDNN generates
    AVX-512 for all: 400 against 190 GFLOP/s on two cores of an AMD EPYC. Decided
    by the vendor, not by a trial: a trial's noise would make two runs round differently.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    intel = cpu_vendor() in ("GenuineIntel", None)
    return x86 and not intel and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` as `F.linear` does; in fp32 on some CPUs by oneDNN.

    `x` is `(B, N, C)` or `(B, H, W, C)`, the weight `(D, C)`, the bias `(D,)`.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not onednn_multiplies_faster():
        return F.linear(x, weight, bias)
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias)  # type: ignore[no-any-return]


class _Product(torch.autograd.Function):
    """`F.linear` in fp32 by oneDNN's products, which torch offers without gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()  # slices fall back to slow code
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        needed_x, needed_weight, needed_bias = ctx.needs_input_grad
        of_x = _multiply(grad, weight.t()) if needed_x else None
        inputs, outputs = x.flatten(0, -2), grad.flatten(0, -2)
        if len(inputs) > MANY and torch.get_num_threads() > 1:
            # all pixels as one row of a picture; in one thread, torch convolves without oneDNN
            maps = [one[None, None].permute(0, 3, 1, 2) for one in (outputs, inputs)]
            options = [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1
            _, of_weight, of_bias = torch.ops.aten.convolution_backward(
                *maps, weight[:, :, None, None], *options, [False, needed_weight, needed_bias]
            )
            return of_x, of_weight.flatten(1) if needed_weight else None, of_bias
        of_weight = None
        if (
            needed_weight and len(weight) > weight.shape[1]
        ):  # wide results are faster than high ones
            of_weight = _multiply(inputs.t(), outputs.t()).t()
        elif needed_weight:
            of_weight = _multiply(outputs.t(), inputs.t())
        return of_x, of_weight, outputs.sum(0) if needed_bias else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


class FastLinear(nn.Linear):
    """`nn.Linear` on tokens `(B, N, C)` or `(B, H, W, C)`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `(…, D)` of `(…, C)`."""
        return linear(input, self.weight, self.bias)


def keep_mask(like: Tensor, p: float) -> Tensor:
    """Return 1 for what is kept and 0, with probability `p`, for what is dropped.

    Drawn from torch's global generator. Four elements a 64-bit word are four times faster on a CPU than
    `bernoulli_`, which draws a double each; and there multiplying by floats is several times faster than
    filling by booleans.

    Args:
        like: `(N,)`; the mask has its dtype.
        p: a multiple of 1 / `LEVELS`.
    """
    count = like.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None)
    draws = words.view(torch.int16)[:count]  # uniform on [-LEVELS/2, LEVELS/2)
    kept = torch.empty_like(like)
    torch.ge(draws, round(p * LEVELS) - LEVELS // 2, out=kept)
    return kept


@torch.library.custom_op(
    "segfit::keep_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def _compiled_mask(like: Tensor, p: float) -> Tensor:
    """Return `keep_mask` of a dense tensor of any shape, as an operation that compilers call."""
    mask = torch.empty_like(like)
    for piece in mask.as_strided((mask.numel(),), (1,)).split(PIECE):
        piece.copy_(keep_mask(piece, p))
    return mask


@_compiled_mask.register_fake
def _(like: Tensor, _p: float) -> Tensor:
    return torch.empty_like(like)


class _ReluDropout(torch.autograd.Function):
    """A dropped unit is one that ReLU switches off: its backward reads both from the result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        # all elements in the order in which they lie in memory
        for piece in x.as_strided((x.numel(),), (1,), x.storage_offset()).split(PIECE):
            piece.clamp_min_(0).mul_(keep_mask(piece, p))
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grads[0], result, 0), None


def relu_dropout_(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Apply ReLU and dropout to `x` in place, leaving out dropout's factor.

    Args:
        x: float, any shape, dense; its value is lost, so no backward may need it.
        p: probability that an element is dropped; 0: plain ReLU.

    Returns:
        the result, and the factor that dropout would have multiplied it with.
    """
    if p == 0.0:
        return F.relu_(x), 1.0
    if x.device.type != "cpu":  # CUDA draws its masks inside the dropout kernel
        return F.dropout(F.relu(x), p), 1.0
    rate = round(p * LEVELS) / LEVELS
    if torch.compiler.is_compiling():
        # A compiler fuses all but the draws, which it would make one by one.
        return F.relu(x) * _compiled_mask(x.detach(), rate), 1 / (1 - rate)
    return _ReluDropout.apply(x, rate), 1 / (1 - rate)
