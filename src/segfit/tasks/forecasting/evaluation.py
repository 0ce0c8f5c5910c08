"""What an evaluation keeps of its forecasts: a CSV file, and some of them as pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor

from segfit.engine.extra_metrics import ExtraMetric
from segfit.engine.findings import Findings
from segfit.engine.task import Batch
from segfit.errors import SegFitError
from segfit.report.evaluation import Evaluation
from segfit.tasks.forecasting.assembly import make_task, quantiles_of
from segfit.tasks.forecasting.data.windows import Windows
from segfit.tasks.forecasting.plots import Forecast, forecast_figure
from segfit.tasks.forecasting.task import ForecastingTask, forecast_of

FORECASTS = "forecasts.csv"
_NAMES = (FORECASTS, "forecasts.png", "errors.csv", "error_by_step.png")
_DAY = 86400


def make_evaluation(
    config: DictConfig,
    device: torch.device,
    options: DictConfig,
    path: Path,
    data: Windows,
    statistics: Mapping[str, Any] | None,
    extra: Sequence[ExtraMetric] = (),
) -> ForecastEvaluation:
    """Return what scores a run's forecasts and writes them down.

    Raises:
        SegFitError: if the future is asked for and what is known in advance is missing there.
    """
    if data.part == "future" and not len(data):
        raise SegFitError(
            f"future=true: the files have to go on for {data.horizon} rows after the last row with a target, with "
            f"data.known={list(config.data.known)} alone."
        )
    task = make_task(config, device, statistics, extra=extra)
    every = config.data.horizon if options.every is None else options.every
    return ForecastEvaluation(
        path, task, data, every=every, pictures=options.pictures, quantiles=quantiles_of(config)
    )


class ForecastEvaluation(Evaluation):
    """Keeps the forecasts of every so many windows.

    Args:
        path: the folder.
        task: scores the batches.
        data: the windows.
        every: windows of a series from one that is written to the next; 0: none is.
        pictures: how many are drawn.
        quantiles: that the model forecasts; empty: it forecasts one value.
    """

    def __init__(
        self,
        path: Path,
        task: ForecastingTask,
        data: Windows,
        *,
        every: int,
        pictures: int,
        quantiles: Sequence[float],
    ) -> None:
        layout = task.layout
        facts = {"targets": layout.columns[: layout.targets], "season": task.season}
        super().__init__(path, replace(task, on_forecast=self._keep), facts, _NAMES)
        self.own, self.data, self.every, self.quantiles = task, data, every, quantiles
        count = min(pictures, len(data))
        self._drawn = {round(step * (len(data) - 1) / max(count - 1, 1)) for step in range(count)}
        self._forecasts: dict[int, Forecast] = {}
        self._tables: dict[int, pd.DataFrame] = {}

    def finish(self, result: Findings) -> Findings:
        """Write the forecasts; of the future, which has no scores, nothing else is shown."""
        if self.data.part == "future":
            result = Findings(seconds=result.seconds)
        if self._tables:
            text = io.StringIO()
            for number, index in enumerate(sorted(self._tables)):
                self._tables[index].to_csv(text, index=False, header=number == 0)
            self.write(self.path / FORECASTS, text.getvalue().encode())
        drawn = [self._forecasts[index] for index in sorted(self._forecasts)]
        if drawn:
            drawing: Callable[[], Figure] = partial(forecast_figure, drawn)
            result = replace(result, figures={**result.figures, "forecasts": drawing})
        return super().finish(result)

    def _keep(self, batch: Batch, values: Tensor) -> None:
        """Take the forecasts of a batch; see `ForecastingTask.on_forecast`."""
        indices = batch["index"].cpu().numpy()  # synchronises, once a batch
        which, number, begin = self.data.locate(indices)
        for row in np.flatnonzero(np.isin(indices, [*self._drawn])).tolist():
            forecast = forecast_of(self.own, self.data.id(indices[row]), batch, values, row)
            self._forecasts[int(indices[row])] = (
                replace(forecast, truth=None) if self.data.part == "future" else forecast
            )
        if self.every:
            rows = np.flatnonzero(number % self.every == 0)
            if len(rows):
                table = self._table(batch, values, rows, which[rows], begin[rows])
                self._tables[int(indices[rows[0]])] = table

    def _table(
        self,
        batch: Batch,
        values: Tensor,
        rows: NDArray[np.int64],
        which: NDArray[np.int64],
        begin: NDArray[np.int64],
    ) -> pd.DataFrame:
        """Return a row a window, target and step: series, date, step, prediction, truth, and the quantiles if any."""
        data, layout = self.data, self.own.layout
        horizon, targets = data.horizon, layout.targets
        names = np.array(data.series.table.names, dtype=object)[which]
        series = np.repeat(names, targets)
        if targets > 1:
            series = series + np.tile([f"/{name}" for name in layout.columns[:targets]], len(rows))
        dates = np.stack([self._dates(*window) for window in zip(which, begin, strict=True)])
        chosen = torch.from_numpy(rows).to(values.device)
        forecast = (
            values[chosen].transpose(1, 2).flatten(0, 1).cpu().numpy()
        )  # (B · targets, horizon, …)
        truth = batch["window"][chosen, data.lookback :, :targets].transpose(1, 2)
        columns: dict[str, Any] = {
            "series": np.repeat(series, horizon),
            "date": np.repeat(dates, targets, axis=0).reshape(-1).astype("datetime64[s]"),
            "step": np.tile(np.arange(1, horizon + 1), len(series)),
            "prediction": self.own.criterion.point(values[chosen])
            .transpose(1, 2)
            .reshape(-1)
            .cpu()
            .numpy(),
            "truth": truth.reshape(-1).cpu().numpy(),
        }
        if data.part == "future":
            columns["truth"] = np.nan
        for place, quantile in enumerate(self.quantiles):
            columns[f"q{quantile:g}"] = forecast[..., place].reshape(-1)
        return pd.DataFrame(columns)

    def _dates(self, which: int, begin: int) -> NDArray[np.int64]:
        """Return the dates of a forecast, (horizon,): those of the series, or of the steps after its end."""
        data, table = self.data, self.data.series.table
        first = begin + data.lookback
        dates = table.dates[first : min(first + data.horizon, table.stops[which])]
        if len(dates) == data.horizon:
            return np.asarray(dates)
        past = np.asarray(table.dates[table.begins[which] : table.ends[which]])
        return following(past, data.horizon)


def following(dates: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Return the dates (count,) that come after some, seconds since 1970, in their usual step.

    Series of days go on on the days of the week that occur in them, series of months on the same day of the month.
    """
    last, step = int(dates[-1]), int(np.median(np.diff(dates)))
    if step % _DAY == 0 and 28 <= step // _DAY <= 366:
        day = np.datetime64(last, "s")
        months = round(step / _DAY / 30.44) * np.arange(1, count + 1)
        begin = day.astype("datetime64[M]")
        end_of_month = (day + np.timedelta64(1, "D")).astype("datetime64[M]") != begin
        offset = day - begin.astype("datetime64[s]")
        if end_of_month:
            ahead = (begin + months + 1).astype("datetime64[s]") - np.timedelta64(1, "D")
        else:
            ahead = (begin + months).astype("datetime64[s]") + offset
        return np.asarray(ahead.astype("datetime64[s]").astype(np.int64))
    if step != _DAY:
        return last + step * np.arange(1, count + 1)
    weekdays = np.unique(dates // _DAY % 7)
    ahead_days = last + _DAY * np.arange(1, 7 * count + 1)
    return np.asarray(ahead_days[np.isin(ahead_days // _DAY % 7, weekdays)][:count])
