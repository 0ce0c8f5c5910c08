"""Losses of forecasts that add up: accumulated micro-batches have the loss of one big batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class ForecastLoss:
    """A mean over all values of an update, by name: "mse", "mae", "huber" or "quantile"."""

    name: str
    delta: float = 1.0  # error up to which huber is a square, in standard deviations
    quantiles: Sequence[float] = ()  # of the quantile loss, the outputs' last dimension; with 0.5

    def totals(self, targets: Tensor) -> Tensor:
        """Return how many values there are, `(1,)` float32, to be summed over the micro-batches of an update."""
        return torch.full((1,), float(targets.numel()), device=targets.device)

    def __call__(self, outputs: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the loss, `()` float32, of outputs `(B, H, T)` and targets `(B, H, T)`.

        The quantile loss is the pinball loss max(q·e, (q - 1)·e) of the errors e = truth - forecast (Koenker and Bassett,
        1978), averaged over the quantiles; its outputs are `(B, H, T, Q)`. `totals` are `(1,)` float32 of the whole update.
        """
        outputs, targets = outputs.float(), targets.float()
        if self.name == "mse":
            value = F.mse_loss(outputs, targets, reduction="sum")
        elif self.name == "mae":
            value = F.l1_loss(outputs, targets, reduction="sum")
        elif self.name == "huber":
            value = F.huber_loss(outputs, targets, reduction="sum", delta=self.delta)
        else:
            parts = []
            for quantile, output in zip(self.quantiles, outputs.unbind(-1), strict=True):
                error = targets - output
                parts.append(torch.maximum(quantile * error, (quantile - 1) * error).sum())
            value = torch.stack(parts).mean()
        return value / totals[0]

    def point(self, outputs: Tensor) -> Tensor:
        """Return one forecast a value, `(B, H, T)`: the median where there are several."""
        return outputs[..., self.quantiles.index(0.5)] if self.quantiles else outputs
