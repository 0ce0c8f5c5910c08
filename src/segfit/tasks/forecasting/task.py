"""Forecasting: what a batch of windows means to the loop, how far forecasts are off, and how they look.

Figures are matplotlib's without pyplot: no global state, no window, no backend to choose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from segfit.engine.findings import Findings
from segfit.engine.task import Batch, Forward
from segfit.tasks.forecasting.data.files import Layout
from segfit.tasks.forecasting.schema import FORECASTERS, MEMORY_ADVICE
from segfit.tasks.scored import ScoredMeter, ScoredTask

Numbers = NDArray[np.floating[Any]]

_PAST, _TRUTH, _FORECAST = "#888888", "#222222", "#d03040"
_COLORS = {"model": _FORECAST, "last": _TRUTH, "season": _PAST}
_SEEN = 2  # horizons of the past that are drawn


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
        if self.name == "quantile":
            # Numbers, not a tensor of them: a copy from the host would make it wait.
            pairs = zip(self.quantiles, (targets[..., None] - outputs).unbind(-1), strict=True)
            parts = [torch.maximum(q * error, (q - 1) * error).sum() for q, error in pairs]
            value = torch.stack(parts).mean()
        elif self.name == "huber":
            value = F.huber_loss(outputs, targets, reduction="sum", delta=self.delta)
        else:
            loss = F.mse_loss if self.name == "mse" else F.l1_loss
            value = loss(outputs, targets, reduction="sum")
        return value / totals[0]

    def point(self, outputs: Tensor) -> Tensor:
        """Return one forecast a value, `(B, H, T)`: the median where there are several."""
        return outputs[..., self.quantiles.index(0.5)] if self.quantiles else outputs


@dataclass(frozen=True)
class ForecastingTask(ScoredTask):
    """Windows of series in, forecasts and scores out. A batch is that of `Windows.gather`."""

    layout: Layout  # of a window's columns
    lookback: int  # rows that are seen
    horizon: int  # rows that are forecast
    season: int = 1  # rows of a season; 1: there is none
    returns: bool = False  # the targets are returns
    standards: Mapping[str, Any] = field(default_factory=dict)  # series → mean, std, step
    # Called with every held-out batch, its forecasts, (B, horizon, targets) or (B, horizon, targets, quantiles) true values,
    # and the sums of each window's errors, (B, errors of each of `FORECASTERS`) float64; all on the device.
    on_forecast: Callable[[Batch, Tensor, Tensor], None] | None = None
    memory_advice: ClassVar[str] = MEMORY_ADVICE

    def prepare(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002 - nothing is random
        """Return the model's input and the targets (B, horizon, targets), standardised."""
        window = (batch["window"] - batch["mean"][:, None]) / batch["std"][:, None]
        targets = window[:, self.lookback :, : self.layout.targets]
        if not self.layout.known:
            return window[:, : self.lookback], targets
        seen = window.clone()
        seen[:, self.lookback :, : self.layout.inputs] = 0  # the future itself is not seen
        return seen, targets

    def meter(self) -> ForecastMeter:
        """Return a fresh collector of scores."""
        return ForecastMeter(self)


class ForecastMeter(ScoredMeter):
    """Scores the forecasts of all windows, beside those of repeating the past; see docs/forecasting.md."""

    def __init__(self, task: ForecastingTask) -> None:
        from segfit.tasks.forecasting import metrics  # torchmetrics: not before the first update

        count, season = task.layout.targets, task.season
        counts = metrics.ForecastMetrics(task.horizon, count, returns=task.returns, season=season)
        super().__init__(task, counts)
        self.error_table = metrics.error_table

    def count(self, forward: Forward, batch: Batch) -> None:
        """Forecast and count a batch."""
        task, count = self.task, self.task.layout.targets
        inputs, targets = task.prepare(batch, 0)
        outputs = forward(inputs)
        values = true_values(outputs, batch["mean"], batch["std"])
        point = task.criterion.point(outputs)
        self.metrics.to(outputs.device)  # synchronises, once a pass
        own = {key: batch[key][:, :count] for key in ("std", "mean", "scale")}
        past = inputs[:, : task.lookback, :count]
        self.metrics.update(point, targets, past=past, when=batch["when"], **own)
        self.update_extra(point.flatten(), targets.flatten())
        self.add_loss(task.loss(outputs, targets, task.totals(targets)), len(targets))
        if task.on_forecast is not None:
            task.on_forecast(batch, values, self.metrics.last)
        if task.panels:
            for row, index in enumerate(batch["index"].tolist()):  # synchronises, once a batch
                if index in task.panels:
                    self.panels[index] = forecast_of(task, task.panels[index], batch, values, row)

    def result(self) -> Findings:
        """Return the scores; synchronises. `scores["loss"]` is the mean over windows. Every process has to call."""
        loss, added, panels = self.merged()
        if not self.updates:
            return Findings()
        scores, by_step = self.metrics.scores()
        scores = {"loss": loss, **scores, **added}
        return Findings(
            scores=scores,
            tables=[self.error_table(scores)],
            values={"mse_by_step": by_step},
            figures={"error_by_step": partial(error_figure, by_step)},
            panels={panel.name: partial(forecast_image, panel) for panel in panels},
        )


@dataclass(frozen=True)
class Forecast:
    """A window and its forecast, true values."""

    name: str
    past: Numbers  # (lookback,)
    truth: Numbers | None  # (horizon,); None: it is not known yet
    forecast: Numbers  # (horizon,)
    band: Numbers | None = None  # (horizon, 2): the lowest and the highest quantile


def true_values(outputs: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return standardised outputs (B, horizon, targets, …) as true values, by statistics (B, columns)."""
    shape = (-1, 1, outputs.shape[2], *(1,) * (outputs.dim() - 3))
    mean, std = (part[:, : outputs.shape[2]].reshape(shape) for part in (mean, std))
    return outputs * std + mean


def forecast_of(
    task: ForecastingTask, name: str, batch: Batch, values: Tensor, row: int
) -> Forecast:
    """Return the first target of a window and its forecast, true `values` of the batch, on the host; synchronises."""
    window, own = batch["window"][row, :, 0].cpu().numpy(), values[row : row + 1].cpu()
    return Forecast(
        name=name if task.layout.targets == 1 else f"{name} {task.layout.columns[0]}",
        past=window[: task.lookback],
        truth=window[task.lookback :],
        forecast=task.criterion.point(own)[0, :, 0].numpy(),
        band=own[0, :, 0, [0, -1]].numpy() if own.dim() == 4 else None,
    )


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
