"""Copies of weights in half precision, made all at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

_PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd)


class HalfWeights(nn.Module):
    """A model whose products take bf16 or fp16 copies of their weights that one call makes, as one casts their gradients.

    Autocast would launch a kernel for each of them, in every pass forward and again backward. Values are the same. Weights
    of layers that compute with them first, as weight standardisation does, are left to autocast, and so are frozen ones.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = [
            f"{path}.{name}".removeprefix(".")
            for path, layer in model.named_modules()
            if isinstance(layer, _PRODUCTS)
            and type(layer).__module__.startswith(("torch.", "segfit."))
            for name, _ in layer.named_parameters(recurse=False)
        ]

    def forward(self, inputs: Tensor) -> Any:
        """Return what the model does of its input, under autocast."""
        weights = {name: self.model.get_parameter(name) for name in self.names}
        weights = {name: weight for name, weight in weights.items() if weight.requires_grad}
        copies = _Copied.apply(*weights.values()) if weights else ()
        return functional_call(self.model, dict(zip(weights, copies, strict=True)), (inputs,))


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, *weights: Tensor) -> tuple[Tensor, ...]:
        context.set_materialize_grads(False)  # what is not used has no gradient
        return tuple(_copies(weights, torch.get_autocast_dtype(weights[0].device.type)))

    @staticmethod
    @once_differentiable
    def backward(_: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        copies = iter(_copies([one for one in gradients if one is not None], torch.float32))
        return tuple(None if one is None else next(copies) for one in gradients)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, list(tensors))
    return copies
