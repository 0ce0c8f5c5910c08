"""ReLU and dropout in one pass, in place, that backward takes for the price of the ReLU alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 2**16  # a mask costs 16 random bits an element, so the rate is a multiple of 1 / LEVELS
PIECE = 2**20  # elements masked at a time: a piece of mask stays in the cache and costs no memory


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
