"""Forecasting: what a batch of windows means to the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from segfit.engine.distributed import SINGLE_PROCESS, Distributed
from segfit.engine.extra_metrics import merge, restore, state_of
from segfit.engine.findings import Findings
from segfit.engine.task import Batch, Forward, count_samples
from segfit.report.text import number
from segfit.tasks.forecasting.data.files import Layout
from segfit.tasks.forecasting.plots import Forecast, error_figure, forecast_image
from segfit.tasks.forecasting.schema import MEMORY_ADVICE

if TYPE_CHECKING:
    from segfit.tasks.forecasting.losses import ForecastLoss

OnForecast = Callable[[Batch, Tensor], None]


@dataclass(frozen=True)
class ForecastingTask:
    """Windows of series in, forecasts and scores out. A batch is that of `Windows.gather`.

    Args:
        layout: of a window's columns.
        lookback: rows that are seen.
        horizon: rows that are forecast.
        criterion: the loss.
        season: rows of a season; 1: there is none.
        returns: the targets are returns.
        panels: index of a held-out window → its name, for those that are drawn.
        on_forecast: called with every held-out batch and its forecasts, (B, horizon, targets) or
            (B, horizon, targets, quantiles), true values on the device.
        distributed: the processes whose windows make up the scores.
    """

    layout: Layout
    lookback: int
    horizon: int
    criterion: ForecastLoss
    season: int = 1
    returns: bool = False
    panels: Mapping[int, str] = field(default_factory=dict)
    on_forecast: OnForecast | None = None
    distributed: Distributed = SINGLE_PROCESS
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
        value: Tensor = self.criterion(outputs.float(), targets, totals)
        return value

    def split(self, inputs: Tensor, targets: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        """Cut windows and targets into pieces of at most `size`."""
        return list(zip(inputs.split(size), targets.split(size), strict=True))

    def true_values(self, batch: Batch, outputs: Tensor) -> Tensor:
        """Return standardised outputs of a batch as true values."""
        shape = (len(outputs), 1, self.layout.targets, *(1,) * (outputs.dim() - 3))
        std, mean = (batch[key][:, : self.layout.targets].reshape(shape) for key in ("std", "mean"))
        return outputs * std + mean

    def meter(self) -> ForecastMeter:
        """Return a fresh collector of scores."""
        return ForecastMeter(self)


class ForecastMeter:
    """Scores the forecasts of all windows, beside those of repeating the past; see docs/forecasting.md."""

    def __init__(self, task: ForecastingTask) -> None:
        from segfit.tasks.forecasting import metrics  # torchmetrics: not before the first update

        self.task = task
        targets = task.layout.targets
        self.metrics = metrics.ForecastMetrics(
            task.horizon, targets, returns=task.returns, season=task.season
        )
        self._error_table, self._warning = metrics.error_table, metrics.warning
        self.loss: Tensor | None = None
        self.windows = 0
        self.panels: dict[int, Forecast] = {}

    def update(self, forward: Forward, batch: Batch) -> None:
        """Forecast and count a batch."""
        task = self.task
        inputs, targets = task.prepare(batch, 0)
        outputs = forward(inputs)
        if task.on_forecast is not None:
            task.on_forecast(batch, task.true_values(batch, outputs))
        before, count = state_of(self.metrics), task.layout.targets
        try:
            self.metrics.to(outputs.device).update(
                task.criterion.point(outputs),
                targets,
                std=batch["std"][:, :count],
                mean=batch["mean"][:, :count],
                scale=batch["scale"],
                past=inputs[:, : task.lookback, :count],
                when=batch["when"],
            )
            loss = task.loss(outputs, targets, task.totals(targets)) * len(targets)
        except Exception:
            restore(self.metrics, before)
            raise
        self.loss = loss if self.loss is None else self.loss + loss
        self.windows += count_samples(batch)
        if task.panels:
            self._keep_panels(batch, task.true_values(batch, outputs))

    def result(self) -> Findings:
        """Read the device; `scores["loss"]` is the mean over windows. Every process has to call."""
        loss = float(self.loss) if self.loss is not None else 0.0
        own = (state_of(self.metrics.cpu()), loss, self.windows, self.panels)
        every = self.task.distributed.gather(own)
        windows = sum(count for _, _, count, _ in every)
        if not windows:
            return Findings()
        merge(self.metrics, [states for states, _, count, _ in every if count])
        found = self.metrics.scores()
        panels = {index: panel for *_, kept in every for index, panel in kept.items()}
        return Findings(
            scores={"loss": sum(part for _, part, _, _ in every) / windows, **found.scores},
            tables=[replace(self._error_table(found.scores), caption=self._caption(found.scores))],
            values={"mse_by_step": found.by_step},
            figures={"error_by_step": partial(error_figure, found.by_step)},
            panels={
                panel.name: partial(forecast_image, panel) for _, panel in sorted(panels.items())
            },
        )

    def _caption(self, scores: Mapping[str, float]) -> str:
        texts = [
            f"{label} {number(scores[name])} ± {number(scores[f'{name}_se'])} (standard error)."
            for name, label in (("ic", "IC"), ("hit_rate", "Hit rate"))
            if name in scores
        ]
        return " ".join([*texts, self._warning(scores)])

    def _keep_panels(self, batch: Batch, values: Tensor) -> None:
        for row, index in enumerate(batch["index"].tolist()):  # synchronises, once a batch
            if index in self.task.panels:
                name = self.task.panels[index]
                self.panels[index] = forecast_of(self.task, name, batch, values, row)


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
