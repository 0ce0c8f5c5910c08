"""What torch does faster on a CPU another way: linear layers, and dropout after ReLU."""

from __future__ import annotations

import platform
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.system.hardware import cpu_vendor

LEVELS = 2**16  # a mask costs 16 random bits an element, so the rate is a multiple of 1 / LEVELS
PIECE = 2**20  # elements masked at a time: a piece of mask stays in the cache and costs no memory


@cache
def onednn_multiplies_faster() -> bool:
    """Say whether fp32 products should go through oneDNN instead of MKL.

    torch's `F.linear` calls MKL in fp32, which runs AVX2 code on processors that are not Intel's. oneDNN, behind
    convolutions, generates AVX-512 for all: 400 against 190 GFLOP/s on two cores of an AMD EPYC. Decided
    by the vendor, not by a trial: a trial's noise would make two runs round differently.
    """
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    intel = cpu_vendor() in ("GenuineIntel", None)
    return x86 and not intel and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias` as `F.linear` does; on some CPUs as a 1×1 convolution.

    `x` is `(B, N, C)` or `(B, H, W, C)`, the weight `(D, C)`, the bias `(D,)`. The result may be a view, so do not change
    it in place.
    """
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu") or not onednn_multiplies_faster():
        return F.linear(x, weight, bias)
    as_map = x if x.dim() == 4 else x.unsqueeze(2)
    y = F.conv2d(as_map.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return y if x.dim() == 4 else y.squeeze(2)


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
    # a compiler fuses the plain form by itself; CUDA draws its masks inside the dropout kernel
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return F.dropout(F.relu(x), p), 1.0
    rate = round(p * LEVELS) / LEVELS
    return _ReluDropout.apply(x, rate), 1 / (1 - rate)
