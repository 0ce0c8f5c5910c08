"""Figures by matplotlib, without pyplot: no global state, no window, no backend to choose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from segfit.tasks.forecasting.schema import FORECASTERS

Numbers = NDArray[np.floating[Any]]

_PAST, _TRUTH, _FORECAST = "#888888", "#222222", "#d03040"
_COLORS = {"model": _FORECAST, "last": _TRUTH, "season": _PAST}
_SEEN = 2  # horizons of the past that are drawn


@dataclass(frozen=True)
class Forecast:
    """A window and its forecast, true values."""

    name: str
    past: Numbers  # (lookback,)
    truth: Numbers | None  # (horizon,); None: it is not known yet
    forecast: Numbers  # (horizon,)
    band: Numbers | None = None  # (horizon, 2): the lowest and the highest quantile


def forecast_image(forecast: Forecast) -> NDArray[np.uint8]:
    """Draw one forecast as a picture, (H, W, 3) uint8 RGB."""
    canvas = FigureCanvasAgg(forecast_figure([forecast]))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def forecast_figure(forecasts: Sequence[Forecast]) -> Figure:
    """Draw forecasts below each other, each with what it was made from and what came."""
    figure = Figure(figsize=(7, 2.4 * len(forecasts)), dpi=100, layout="constrained")
    for number, one in enumerate(forecasts, 1):
        axes = figure.add_subplot(len(forecasts), 1, number)
        past = one.past[-_SEEN * len(one.forecast) :]
        steps = np.arange(1, len(one.forecast) + 1)
        axes.plot(np.arange(1 - len(past), 1), past, color=_PAST, linewidth=1, label="seen")
        if one.truth is not None:
            axes.plot(steps, one.truth, color=_TRUTH, linewidth=1, label="truth")
        axes.plot(steps, one.forecast, color=_FORECAST, linewidth=1.4, label="forecast")
        if one.band is not None:
            axes.fill_between(steps, *one.band.T, color=_FORECAST, alpha=0.2, linewidth=0)
        axes.axvline(0.5, color=_PAST, linewidth=0.6, linestyle=":")
        axes.set_title(one.name, size=9, loc="left")
        axes.tick_params(labelsize=8)
    figure.axes[0].legend(fontsize=8, loc="upper left", frameon=False)
    return figure


def error_figure(by_step: Mapping[str, Numbers]) -> Figure:
    """Draw the mean squared error of each forecaster by step of the horizon, standardised values."""
    figure = Figure(figsize=(6, 3.6), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name, errors in by_step.items():
        steps = np.arange(1, len(errors) + 1)
        axes.plot(steps, errors, color=_COLORS[name], label=FORECASTERS[name])
    axes.set(xlabel="step of the horizon", ylabel="MSE, standardised")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return figure
