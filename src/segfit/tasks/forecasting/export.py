"""A forecasting model as a program that needs torch alone."""

from __future__ import annotations

import json

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.tasks.forecasting.assembly import make_sources, quantiles_of
from segfit.tasks.forecasting.data.files import columns_of


class Deployed(nn.Module):
    """A model from windows of true values to forecasts of true values.

    Args:
        model: takes standardised windows.
        lookback: rows that are seen.
        inputs: columns whose future is not seen.
        targets: columns that are forecast.
    """

    def __init__(self, model: nn.Module, lookback: int, inputs: int, targets: int) -> None:
        super().__init__()
        self.model, self.lookback, self.inputs, self.targets = model, lookback, inputs, targets

    def forward(self, window: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return forecasts, (B, horizon, targets) float32 or (B, horizon, targets, quantiles).

        Args:
            window: (B, lookback, columns) float32; with columns that are known in advance (B, lookback + horizon,
                columns), where of the last rows only those columns are looked at.
            mean: (B, columns) of each window's series, as in series.json.
            std: (B, columns).
        """
        window = (window - mean[:, None]) / std[:, None]
        future = torch.zeros_like(window[:, self.lookback :, : self.inputs])
        rest = window[:, self.lookback :, self.inputs :]
        seen = torch.cat([window[:, : self.lookback], torch.cat([future, rest], 2)], 1)
        outputs: Tensor = self.model(seen)
        scale, level = std[:, None, : self.targets], mean[:, None, : self.targets]
        if outputs.dim() == 4:
            scale, level = scale[..., None], level[..., None]
        return outputs * scale + level


def make_exported(
    config: DictConfig, model: nn.Module
) -> tuple[nn.Module, dict[str, Tensor], dict[str, str]]:
    """Return what is exported of a model, example inputs by name, and text files that go with it.

    Args:
        config: the run's; its data have to be there, for the statistics of each series.
        model: trained; it may be changed.
    """
    layout, lookback = columns_of(config), config.data.lookback
    series = make_sources(config)["train"].series
    mean, std, _ = series.statistics
    facts = {
        "lookback": lookback,
        "horizon": config.data.horizon,
        "columns": layout.columns,
        "targets": layout.columns[: layout.targets],
        "known": layout.columns[layout.inputs :],
        "returns": config.data.returns,
        "quantiles": quantiles_of(config),
        "series": {
            name: {"mean": mean[number].tolist(), "std": std[number].tolist()}
            for number, name in enumerate(series.table.names)
        },
    }
    rows = lookback + (config.data.horizon if layout.known else 0)
    columns = len(layout.columns)
    deployed = Deployed(model.cpu().float(), lookback, layout.inputs, layout.targets)
    inputs = {
        "window": torch.zeros(2, rows, columns),
        "mean": torch.zeros(2, columns),
        "std": torch.ones(2, columns),
    }
    return deployed.eval(), inputs, {"series.json": json.dumps(facts)}
