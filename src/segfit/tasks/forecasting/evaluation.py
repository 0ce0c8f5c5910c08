"""What an evaluation keeps of its forecasts, what Python gets of them, and the model as a program without SegFit."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.data.preflight import spread
from segfit.data.source import some
from segfit.engine.findings import Findings
from segfit.engine.task import Batch, Task
from segfit.errors import SegFitError
from segfit.models.build import Exported
from segfit.report.evaluation import Evaluation
from segfit.tasks.forecasting import assembly
from segfit.tasks.forecasting.assembly import example_input, make_sources, quantiles_of
from segfit.tasks.forecasting.data.dates import parsed, steady_step
from segfit.tasks.forecasting.data.files import Layout, layout_of
from segfit.tasks.forecasting.data.series import Windows
from segfit.tasks.forecasting.schema import ERRORS, FORECASTERS, error_names
from segfit.tasks.forecasting.task import ForecastingTask, forecast_figure, forecast_of, true_values

FORECASTS = "forecasts.csv"
_NAMES = (FORECASTS, "forecasts.png", "errors.csv", "error_by_step.png")
_DAY = 86400
_ENOUGH = 6  # dates whose usual step is known

Vector = NDArray[np.int64]
Go = Callable[[Task, Any], None]  # lets a task see the samples of a dataset


class ForecastEvaluation(Evaluation):
    """Scores a run's forecasts, and keeps those of every so many windows of a series.

    Raises a SegFitError if the future is asked for and what is known in advance is missing there.
    """

    data: Windows

    def __init__(
        self, config: DictConfig, task: ForecastingTask, options: DictConfig, path: Path, data: Any
    ) -> None:
        if data.part == "future" and not len(data):
            raise SegFitError(
                f"future=true: the files have to go on for {data.horizon} rows after the last row with a target, with "
                f"data.known={list(config.data.known)} alone."
            )
        data.series.standardise(task.standards)
        layout = task.layout
        facts = {"targets": layout.columns[: layout.targets], "season": task.season}
        super().__init__(path, replace(task, on_forecast=self._keep), facts, _NAMES)
        _, _, begin = data.locate(np.arange(len(data)))
        seen, rows = begin + data.lookback - 1, max(data.horizon, task.season)
        # Windows overlap, and series of one date move together: blocks of dates are drawn anew, not windows.
        self._blocks = np.unique(data.series.table.dates[seen], return_inverse=True)[1] // rows
        blocks, forecasters = int(self._blocks.max(initial=-1)) + 1, 3 if task.season > 1 else 2
        self._sums = np.zeros((blocks, forecasters * len(ERRORS) + 1))  # errors, and how many
        self._truths = np.zeros((blocks, layout.targets))
        if data.part != "future":
            self.counts, self.truths = dict(enumerate(self._sums)), dict(enumerate(self._truths))
            self.units = f"blocks of {rows} dates", [str(block) for block in self.counts]
        self.own, self.data = task, data
        self.every = config.data.horizon if options.every is None else options.every
        self._drawn = spread(len(data), options.pictures)
        self._forecasts: dict[int, Any] = {}
        self._tables: dict[int, pd.DataFrame] = {}

    def finish(self, result: Findings) -> Findings:
        """Write the forecasts; of the future, which has no scores, nothing else is shown."""
        if self.data.part == "future":
            result = Findings(seconds=result.seconds)
        if self._tables:
            table = pd.concat([self._tables[index] for index in sorted(self._tables)])
            self.write(self.path / FORECASTS, table.to_csv(index=False).encode())
        if self._forecasts:
            drawn = [self._forecasts[index] for index in sorted(self._forecasts)]
            figure = partial(forecast_figure, drawn)
            result = replace(result, figures={**result.figures, "forecasts": figure})
        return super().finish(result)

    def scores_of(self, sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        """Return the mean errors of the model and of the naive forecasts."""
        names = error_names([*FORECASTERS][: sums.shape[1] // len(ERRORS)])
        return dict(zip(names, (sums[:, :-1] / sums[:, -1:]).T, strict=True))

    def _keep(self, batch: Batch, values: Tensor, errors: Tensor) -> None:
        """Take the forecasts of a batch; see `ForecastingTask.on_forecast`."""
        indices = batch["index"].cpu().numpy()  # synchronises, once a batch
        _, number, _ = self.data.locate(indices)
        for row in np.flatnonzero(np.isin(indices, self._drawn)).tolist():
            forecast = forecast_of(self.own, self.data.id(indices[row]), batch, values, row)
            if self.data.part == "future":
                forecast = replace(forecast, truth=None)
            self._forecasts[int(indices[row])] = forecast
        if self.every and len(rows := np.flatnonzero(number % self.every == 0)):
            self._tables[int(indices[rows[0]])] = self._table(batch, values, indices, rows)
        truth = batch["window"][:, self.data.lookback :, : self.own.layout.targets]
        counted = torch.full_like(errors[:, :1], truth[0].numel())
        np.add.at(self._sums, self._blocks[indices], torch.cat([errors, counted], 1).cpu().numpy())
        np.add.at(self._truths, self._blocks[indices], truth.sum(1).cpu().numpy())

    def _table(self, batch: Batch, values: Tensor, indices: Vector, rows: Vector) -> pd.DataFrame:
        """Return a row a window, target and step: series, date, step, prediction, truth, and the quantiles if any."""
        data, layout, criterion = self.data, self.own.layout, self.own.criterion
        which, _, begin = data.locate(indices[rows])
        horizon, targets, names = data.horizon, layout.targets, data.series.table.names
        endings = [f"/{name}" for name in layout.columns[:targets]] if targets > 1 else [""]
        series = [names[number] + ending for number in which for ending in endings]
        dates = np.stack([self._dates(*window) for window in zip(which, begin, strict=True)])
        chosen = torch.from_numpy(rows).to(values.device)
        kept, truth = values[chosen], batch["window"][chosen, data.lookback :, :targets]
        forecasts, points, truths = (
            part.transpose(1, 2).flatten(0, 1).cpu().numpy()  # (B · targets, horizon, …)
            for part in (kept, criterion.point(kept), truth)
        )
        columns: dict[str, Any] = {
            "series": np.repeat(series, horizon),
            "date": np.repeat(dates, targets, axis=0).reshape(-1).astype("datetime64[s]"),
            "step": np.tile(np.arange(1, horizon + 1), len(series)),
            "prediction": points.reshape(-1),
            "truth": np.nan if data.part == "future" else truths.reshape(-1),
        }
        for place, quantile in enumerate(criterion.quantiles):
            columns[f"q{quantile:g}"] = forecasts[..., place].reshape(-1)
        return pd.DataFrame(columns)

    def _dates(self, which: int, begin: int) -> Vector:
        """Return the dates of a forecast, (horizon,): those of the series, or of the steps after its end."""
        table, horizon = self.data.series.table, self.data.horizon
        first = begin + self.data.lookback
        dates = table.dates[first : min(first + horizon, table.stops[which])]
        if len(dates) < horizon:
            return following(table.dates[table.begins[which] : table.ends[which]], horizon)
        return dates


make_evaluation = ForecastEvaluation


def predict(
    config: DictConfig, task: ForecastingTask, _: DictConfig, inputs: Sequence[Any], go: Go
) -> list[Any]:
    """Return forecasts (horizon, targets) or (…, quantiles) of data frames or arrays, as `TaskEvaluation.predict` says.

    Their last rows are looked back at; of columns known in advance there are `horizon` rows more. They are standardised as
    the run's series were; of several, as the one that `frame.attrs["series"]` names.
    """
    layout, data, standards = task.layout, config.data, _standards(config, task.standards)
    future = data.horizon if layout.known else 0
    samples, found = [], dict[int, Any]()
    for number, given in enumerate(inputs):
        names, name = [*standards], getattr(given, "attrs", {}).get("series")
        if len(names) > 1 and name not in names:
            raise SegFitError(
                f"input {number}: which series? Set frame.attrs['series'] to one of: {some(names)}."
            )
        own = standards[name if name in names else names[0]]
        _refuse_table(f"input {number}", given, layout, own["step"])
        try:
            values = pd.DataFrame(given, columns=[*layout.columns]).to_numpy(np.float64, copy=True)
        except (TypeError, ValueError) as error:
            raise SegFitError(f"input {number}: no table of numbers ({error}).") from error
        if data.returns:
            targets = np.log(values[:, : layout.targets])
            values = values[1:]
            values[:, : layout.targets] = np.diff(targets, axis=0)
        window = np.zeros((data.lookback + data.horizon, len(layout.columns)), np.float32)
        seen = values[-data.lookback - future :]
        needed = np.isfinite(seen)
        needed[data.lookback :, : layout.inputs] = True  # of the future, only what is known counts
        if len(seen) < data.lookback + future or not needed.all():
            gone = [layout.columns[at] for at in np.flatnonzero(~needed.all(0))]
            there = f"{len(values)} are, with gaps in: {some(gone) or 'none'}"
            raise SegFitError(
                f"input {number}: the last {data.lookback} + {future} rows of {some(layout.columns)} have to be there; {there}."
            )
        window[: len(seen)] = np.nan_to_num(seen)
        own = {key: np.array(own[key], np.float32) for key in ("mean", "std")}
        own["scale"] = np.ones(layout.targets, np.float32)  # of scores, which nobody reads
        samples.append({"window": window, **own, "when": 0, "index": number})

    def take(batch: Batch, values: Tensor, _: Tensor) -> None:
        found.update(zip(batch["index"].tolist(), values.cpu().numpy(), strict=True))

    go(replace(task, on_forecast=take), samples)
    return [found[index] for index in sorted(found)]


def _refuse_table(label: str, given: Any, layout: Layout, step: int) -> None:
    """Raise a SegFitError if a data frame lacks columns, or its dates do not rise in the run's steps of `step` seconds."""
    if not isinstance(given, pd.DataFrame):
        return
    if gone := [name for name in layout.columns if name not in given]:
        raise SegFitError(f"{label}: there is no column {some(gone)}. It has: {some(list(given))}.")
    if layout.date not in given and not isinstance(given.index, pd.DatetimeIndex):
        return
    column = given[layout.date] if layout.date in given else given.index.to_series()
    dates = parsed(column).dt.tz_localize(None).to_numpy("datetime64[s]").astype(np.int64)
    if (np.diff(dates) <= 0).any():
        raise SegFitError(f"{label}: {layout.date} does not rise. Sort the rows, the oldest first.")
    theirs = steady_step(dates) if len(dates) > _ENOUGH else 0
    if step and theirs and abs(theirs - step) > step / 5:
        raise SegFitError(
            f"{label}: a row every {theirs} seconds, but the run has one every {step}. Resample the rows."
        )


def following(dates: Vector, count: int) -> Vector:
    """Return the dates (count,) that come after some, seconds since 1970, in their usual step.

    Series of days go on on the days of the week that occur in them, series of months on the same day of the month.
    """
    last, step = pd.Timestamp(int(dates[-1]), unit="s"), int(np.median(np.diff(dates)))
    unit = pd.Timedelta(step, "s")
    if step % _DAY == 0 and 28 <= step // _DAY <= 366:
        months = round(step / _DAY / 30.44)
        unit = pd.offsets.MonthEnd(months) if last.is_month_end else pd.DateOffset(months=months)
    elif step == _DAY:
        weekdays = np.bincount((dates // _DAY + 3) % 7, minlength=7) > 0  # from Monday on
        unit = pd.offsets.CustomBusinessDay(weekmask=weekdays.astype(int).tolist())
    ahead = pd.date_range(last, periods=count + 1, freq=unit)[1:]
    return np.asarray(ahead.to_numpy("datetime64[s]").astype(np.int64))


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


def _standards(config: DictConfig, kept: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return what a run standardised its series by, computed anew if it was killed before it wrote that down."""
    return kept or assembly.make_statistics(config, make_sources(config))["series"]


def make_exported(
    config: DictConfig, model: nn.Module, _: float = 1.0, recorded: Mapping[str, Any] | None = None
) -> Exported:
    """Return what is exported of a run's model, which may be changed."""
    layout, standards = layout_of(config.data), _standards(config, (recorded or {}).get("series"))
    facts = {
        "lookback": config.data.lookback,
        "horizon": config.data.horizon,
        "columns": layout.columns,
        "targets": layout.columns[: layout.targets],
        "known": layout.columns[layout.inputs :],
        "returns": config.data.returns,
        "quantiles": quantiles_of(config),
        "series": {
            name: {key: own[key] for key in ("mean", "std")} for name, own in standards.items()
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
