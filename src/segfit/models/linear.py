"""Linear layers by whichever of torch's two CPU libraries is fast on this processor."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segfit.system.hardware import cpu_vendor


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
    if torch.compiler.is_compiling() or not _suits_onednn(x):
        return F.linear(x, weight, bias)
    as_map = x if x.dim() == 4 else x.unsqueeze(2)
    y = F.conv2d(as_map.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)
    return y if x.dim() == 4 else y.squeeze(2)


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


def _suits_onednn(x: Tensor) -> bool:
    fp32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return fp32 and x.device.type == "cpu" and onednn_multiplies_faster()


class FastLinear(nn.Linear):
    """`nn.Linear` on tokens `(B, N, C)` or `(B, H, W, C)`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `(…, D)` of `(…, C)`."""
        return linear(input, self.weight, self.bias)
