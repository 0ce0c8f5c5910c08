"""A forecasting model as a program that needs torch alone."""

from __future__ import annotations

import json

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.models.build import Exported
from segfit.tasks.forecasting.assembly import example_input, make_sources, quantiles_of
from segfit.tasks.forecasting.data.files import layout_of
from segfit.tasks.forecasting.task import true_values


class Deployed(nn.Module):
    """A model of standardised windows as one from windows of true values to forecasts of true values."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, window: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Return forecasts, (B, horizon, targets) float32 or (B, horizon, targets, quantiles).

        The window is (B, lookback, columns) float32; with columns that are known in advance (B, lookback + horizon,
        columns), where of the last rows only those columns are looked at. `mean` and `std` are (B, columns) of each
        window's series, as in series.json.
        """
        return true_values(self.model((window - mean[:, None]) / std[:, None]), mean, std)


def make_exported(config: DictConfig, model: nn.Module) -> Exported:
    """Return what is exported of a trained model.

    The run's data have to be there, for the statistics of each series. The model may be changed.
    """
    layout, series = layout_of(config.data), make_sources(config)["train"].series
    mean, std, _ = series.statistics
    facts = {
        "lookback": config.data.lookback,
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
    columns = len(layout.columns)
    inputs = {
        "window": example_input(config, 2, torch.device("cpu")),
        "mean": torch.zeros(2, columns),
        "std": torch.ones(2, columns),
    }
    files = {"series.json": json.dumps(facts)}
    return Exported(Deployed(model.cpu().float()).eval(), inputs, files, outputs=("forecasts",))
