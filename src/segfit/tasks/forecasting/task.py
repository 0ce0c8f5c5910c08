"""Forecasting: what a batch of windows means to the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.extra_metrics import ExtraMetric, merge, restore, state_of
from segfit.engine.findings import Findings
from segfit.engine.task import Batch, Forward, count_samples
from segfit.tasks.forecasting.data.files import Layout
from segfit.tasks.forecasting.plots import Forecast, error_figure, forecast_image
from segfit.tasks.forecasting.schema import MEMORY_ADVICE

if TYPE_CHECKING:
    from segfit.tasks.forecasting.losses import ForecastLoss


@dataclass(frozen=True)
class ForecastingTask:
    """Windows of series in, forecasts and scores out. A batch is that of `Windows.gather`."""

    layout: Layout  # of a window's columns
    lookback: int  # rows that are seen
    horizon: int  # rows that are forecast
    criterion: ForecastLoss
    season: int = 1  # rows of a season; 1: there is none
    returns: bool = False  # the targets are returns
    # Index of a held-out window → its name, for those that are drawn.
    panels: Mapping[int, str] = field(default_factory=dict)
    # Called with every held-out batch and its forecasts, (B, horizon, targets) or (B, horizon, targets, quantiles), true
    # values on the device.
    on_forecast: Callable[[Batch, Tensor], None] | None = None
    distributed: Distributed = SINGLE_PROCESS  # the processes whose windows make up the scores
    extra: Sequence[ExtraMetric] = ()  # metrics whose results join the scores
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

    def totals(self, targets: Tensor) -> Tensor:
        """Return the denominator of the loss, (1,) float32."""
        return self.criterion.totals(targets)

    def loss(self, outputs: Tensor, targets: Tensor, totals: Tensor) -> Tensor:
        """Return the loss, ()."""
        return self.criterion(outputs, targets, totals)

    def split(self, inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Cut windows and targets into pieces of at most `size`."""
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def meter(self) -> ForecastMeter:
        """Return a fresh collector of scores."""
        return ForecastMeter(self)


class ForecastMeter:
    """Scores the forecasts of all windows, beside those of repeating the past; see docs/forecasting.md."""

    def __init__(self, task: ForecastingTask) -> None:
        from segfit.tasks.forecasting import metrics  # torchmetrics: not before the first update

        self.task = task
        self.error_table = metrics.error_table
        self.metrics = metrics.ForecastMetrics(
            task.horizon, task.layout.targets, returns=task.returns, season=task.season
        )
        self.extra = [extra.make() for extra in task.extra]
        self.all_metrics = (self.metrics, *self.extra)
        self.loss: Tensor | None = None
        self.windows = self.batches = 0
        self.panels: dict[int, Forecast] = {}

    def update(self, forward: Forward, batch: Batch) -> None:
        """Forecast and count a batch."""
        task, count = self.task, self.task.layout.targets
        inputs, targets = task.prepare(batch, 0)
        outputs = forward(inputs)
        values = true_values(outputs, batch["mean"], batch["std"])
        if task.on_forecast is not None:
            task.on_forecast(batch, values)
        before = [state_of(metric) for metric in self.all_metrics]
        point = task.criterion.point(outputs)
        try:
            self.metrics.to(outputs.device)  # synchronises, once a pass
            self.metrics.update(
                point,
                targets,
                std=batch["std"][:, :count],
                mean=batch["mean"][:, :count],
                scale=batch["scale"],
                past=inputs[:, : task.lookback, :count],
                when=batch["when"],
            )
            for extra, metric in zip(task.extra, self.extra, strict=True):
                # synchronises, once a pass
                extra.update(metric.to(point.device), point.flatten(), targets.flatten())
            loss = task.loss(outputs, targets, task.totals(targets)) * len(targets)
        except Exception:
            for metric, state in zip(self.all_metrics, before, strict=True):
                restore(metric, state)
            raise
        self.loss = loss if self.loss is None else self.loss + loss
        self.windows += count_samples(batch)
        self.batches += 1
        if task.panels:
            for row, index in enumerate(batch["index"].tolist()):  # synchronises, once a batch
                if index in task.panels:
                    self.panels[index] = forecast_of(task, task.panels[index], batch, values, row)

    def result(self) -> Findings:
        """Return the scores; synchronises. `scores["loss"]` is the mean over windows. Every process has to call."""
        loss = float(self.loss) if self.loss is not None else 0.0
        states = [state_of(metric.cpu()) for metric in self.all_metrics]
        own = (states, loss, (self.windows, self.batches), self.panels)
        every = self.task.distributed.gather(own)
        windows, batches = map(sum, zip(*(counts for _, _, counts, _ in every), strict=True))
        if not windows:
            return Findings()
        counted = [states for states, _, (count, _), _ in every if count]
        for metric, *parts in zip(self.all_metrics, *counted, strict=True):
            merge(metric, parts)
        scores, by_step = self.metrics.scores()
        for extra, metric in zip(self.task.extra, self.extra, strict=True):
            scores |= extra.compute(metric, batches)
        panels = {index: panel for *_, kept in every for index, panel in kept.items()}
        return Findings(
            scores={"loss": sum(part for _, part, _, _ in every) / windows, **scores},
            tables=[self.error_table(scores)],
            values={"mse_by_step": by_step},
            figures={"error_by_step": partial(error_figure, by_step)},
            panels={
                panel.name: partial(forecast_image, panel) for _, panel in sorted(panels.items())
            },
        )


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
