"""What `nn.LSTM` takes besides its results, on tensors without data: cuDNN's on a card, oneDNN's on a CPU.

What torch allocates around cuDNN is in aten/src/ATen/native/cudnn/RNN.cpp. What cuDNN asks for itself it says on a card
alone, so answers that others published stand for it. Kept for backward (reserve space): five numbers for each step and unit
of a layer (four gates, the cell), and one more between two layers. From that follow 736,000,000 bytes for 4 layers of 320
units and 25,000 steps in fp32 (pytorch/pytorch issue 2895), and, but for 16, 24,576,016 for a layer of 768 units and 3,200
steps in fp16 (tts_angular in pytorch/benchmarks/dynamo/microbenchmarks). In use during a call (workspace): 1.46 times the
weights in the former.

oneDNN is asked, with a short and narrow series.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

aten = torch.ops.aten

WORKSPACE = 1.5  # times the weights
KEPT = 5  # numbers a step, unit and layer

_SERIES, _STEPS = 32, (16, 32)  # of which oneDNN is asked: its buffers are rounded up to pages
_LSTM = 2  # torch's number for it


def lstm(
    series: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    _: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `torch.lstm`, whose arguments these are, does: outputs, and the last hidden and cell states.

    The series is (B, T, columns) if `batch_first`, else (T, B, columns); a state (layers · directions, B, units).
    """
    hidden, cell = states
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        series, hidden, cell = (part.to(dtype) for part in (series, hidden, cell))
    kept = KEPT * num_layers + num_layers - 1 if train else 0
    masks = num_layers - 1 if train and dropout else 0  # a byte each
    units = hidden.shape[-1] * (2 if bidirectional else 1)
    sizes = batch_first, units, kept * series.element_size() + masks
    return _CudnnLSTM.apply(series, hidden, cell, *weights, sizes)  # type: ignore[no-any-return]


class _CudnnLSTM(torch.autograd.Function):
    """Tensors come first, so that gradients come in the order of the graph's edges."""

    @staticmethod
    def forward(
        ctx: Any, series: Tensor, hidden: Tensor, cell: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        *weights, (batch_first, units, bytes_each) = rest
        by_step = _by_step(series, batch_first)
        steps, batch, _ = by_step.shape
        # With autocast the weights are converted into one buffer; else they lie in one.
        size = sum(weight.numel() for weight in weights)
        converted = series.new_empty(size) if weights[0].dtype != series.dtype else None
        outputs = series.new_empty(steps, batch, units)
        outputs = outputs.transpose(0, 1) if batch_first else outputs
        last = torch.empty_like(hidden), torch.empty_like(cell)
        _take(series, WORKSPACE * size * series.element_size())
        reserve = _take(series, steps * batch * units * bytes_each)
        ctx.batch_first, ctx.size = batch_first, size
        ctx.save_for_backward(series, hidden, cell, outputs, reserve, converted, *weights)
        return outputs, *last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        series, hidden, cell, outputs, _, _, *weights = ctx.saved_tensors
        given = gradients[0] if gradients[0] is not None else torch.zeros_like(outputs)
        ends = [torch.zeros_like(hidden), torch.zeros_like(cell)]
        inputs, outer = (_by_step(part, ctx.batch_first) for part in (series, given))
        result = torch.empty_like(inputs)
        firsts = [torch.empty_like(hidden), torch.empty_like(cell)]
        workspace = WORKSPACE * ctx.size * series.element_size()
        _take(series, workspace)
        del outer, ends
        buffer = series.new_zeros(ctx.size)
        _take(series, workspace)
        del inputs
        pieces = buffer.split([weight.numel() for weight in weights])
        parts = [
            piece.view(weight.shape).to(weight.dtype)
            for piece, weight in zip(pieces, weights, strict=True)
        ]
        result = result.transpose(0, 1) if ctx.batch_first else result
        return result, *firsts, *parts, None


def onednn_workspace(series: Tensor, weights: Tensor) -> Tensor:
    """Return what oneDNN keeps of a layer for backward, uint8: series (T, B, columns), weights (4 · units, columns)."""
    steps, batch, columns = series.shape
    few, many = (_onednn_bytes(each, columns, len(weights) // 4, series.dtype) for each in _STEPS)
    slope = (many - few) / (_STEPS[1] - _STEPS[0])
    size = (few + slope * (steps - _STEPS[0])) * batch / _SERIES
    return torch.empty(round(size), dtype=torch.uint8, device=series.device)


def onednn_scratch(args: Sequence[Any]) -> int:
    """Return the bytes that a layer's backward takes, from its arguments: for oneDNN, and for the gradient in its order."""
    series, given, units = args[0], args[10], args[15]
    steps, batch, _ = series.shape
    copied = 0 if given.is_contiguous() else series.element_size()
    # Gates, of which oneDNN makes each row a cache line longer; or the gradient in fp32.
    numbers = 4 * units + 16 if series.dtype == torch.float32 else units
    return int(steps * batch * (4 * numbers + copied * units))


@cache
def _onednn_bytes(steps: int, columns: int, units: int, dtype: torch.dtype) -> int:
    with _disable_current_modes(), torch.enable_grad():
        series = torch.zeros(steps, _SERIES, columns, dtype=dtype)
        state = torch.zeros(_SERIES, units, dtype=dtype)
        shapes = (4 * units, columns), (4 * units, units), (4 * units,), (4 * units,)
        weights = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        flags: tuple[Any, ...] = False, [], _LSTM, units, 1, True, False, False, True
        return int(aten.mkldnn_rnn_layer(series, *weights, state, state, *flags)[3].numel())


def _by_step(tensor: Tensor, batch_first: bool) -> Tensor:
    return tensor.transpose(0, 1).contiguous() if batch_first else tensor


def _take(like: Tensor, size: float) -> Tensor:
    return like.new_empty(int(size), dtype=torch.uint8)
