"""Memory that kernels take and give back by themselves, which no tensor of Python's ever shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def cuda_scratch(func: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the bytes that an operation on CUDA takes from the caching allocator besides its results."""
    packet = func._overloadpacket
    if packet is aten._scaled_dot_product_flash_attention_backward:
        # fp32 sums of dq, and one number a row: flash_attn's mha_bwd
        batch, heads, length, width = map(int, args[1].shape)
        return 4 * batch * heads * (-(-length // 128) * 128) * (width + 1)
    if packet is aten._scaled_dot_product_efficient_attention_backward:
        q, k = args[1], args[2]
        rows: int = 4 * q.numel() // q.shape[-1]
        sums: int = 0 if q.dtype == torch.float32 else 4 * (q.numel() + 2 * k.numel())
        return rows + sums
    if packet is aten.convolution and args[8] == 1:
        return _bytes(args[0], args[1], result)
    if packet is aten.convolution_backward and args[9] == 1:
        return _bytes(args[0], args[1], args[2])
    return 0


def no_scratch(*_: Any) -> int:
    """Return 0: what the CPU's kernels take besides their results is too little to count (docs/plan.md)."""
    return 0


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
