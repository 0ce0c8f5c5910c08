"""Config → the objects of a forecasting: series, windows, model, loss."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from segfit.config.check import plain
from segfit.data.preflight import Preflight
from segfit.errors import SegFitError
from segfit.models.build import Weights
from segfit.models.forecasters import Forecaster
from segfit.tasks.forecasting.data.dates import date_text, steady_step
from segfit.tasks.forecasting.data.files import layout_of
from segfit.tasks.forecasting.data.series import PARTS, LazySeries, Windows
from segfit.tasks.forecasting.schema import held_out_shape, remark
from segfit.tasks.forecasting.task import ForecastingTask, ForecastLoss
from segfit.tasks.scored import ExtraMetric, checked_metrics

__all__ = ["remark"]

_SCORES = ("loss", "mse", "mae", "true_mse", "true_mae", "mase", "ic", "hit_rate")


def make_sources(config: DictConfig) -> dict[str, Windows]:
    """Return the windows of each part: train, val, test and future, one a series; they are read when needed."""
    lazy = LazySeries(config.data)
    return {part: Windows(lazy, part, config.data) for part in PARTS}


def settle(config: DictConfig, earlier: Mapping[str, Any], notice: Callable[[str], None]) -> None:
    """Keep with the run which columns are what and in which order, however its files are written later.

    A run that starts from an `earlier` one with the same columns has them in the order of its weights.
    """
    if config.data.name != "csv":
        return
    layout = layout_of(config.data)
    for name in layout.left_out:
        notice(f"{name}: a column without a name is left out. To read it, name it in data.columns.")
    columns, targets = list(layout.columns), list(layout.columns[: layout.targets])
    csv = earlier.get("data.name") == "csv"
    theirs = [earlier[f"data.{key}"] if csv else [] for key in ("columns", "target")]
    if [sorted(columns), sorted(targets)] == [sorted(one) for one in theirs]:
        columns, targets = theirs
    config.data.date, config.data.columns, config.data.target = layout.date, columns, targets


def check_sources(
    _: DictConfig, sources: Mapping[str, Windows], needs: Mapping[str, int], progress: Any = None
) -> Preflight:
    """Read the series, or what is kept of them; raise a SegFitError with every problem of the data set."""
    (lazy,) = {source.lazy for source in sources.values()}
    lazy.progress = progress
    empty = [part for part, least in needs.items() if len(sources[part]) < least]
    if empty:
        raise SegFitError(
            f"{' and '.join(empty)}: there is no window (data.lookback + data.horizon = {sources[empty[0]].lookback} + "
            f"{sources[empty[0]].horizon} rows). Change data.split, or shorten data.horizon."
        )
    return Preflight(lazy.series.notices)


def make_train_dataset(_: DictConfig, source: Windows) -> Windows:
    """Return windows, which are a dataset, too."""
    return source


make_held_out_dataset = make_train_dataset


def cached_forms(*_: Any) -> dict[str, Any]:
    """Return nothing: series keep their own files."""
    return {}


reading_options = cached_forms


def make_network(config: DictConfig, *, pretrained: bool) -> tuple[nn.Module, Weights]:  # noqa: ARG001
    """Return the model of a config: `example_input` → (B, horizon, targets) or (B, horizon, targets, quantiles)."""
    layout = layout_of(config.data)
    model = Forecaster(
        plain(config.model),
        lookback=config.data.lookback,
        horizon=config.data.horizon,
        channels=layout.inputs,
        targets=layout.targets,
        known=layout.known,
        quantiles=len(quantiles_of(config)),
    )
    return model, Weights()


def example_input(config: DictConfig, batch_size: int, device: torch.device) -> Tensor:
    """Return what the model gets of a batch: (B, lookback, columns), (B, lookback + horizon, columns) with known ones."""
    rows, columns, _, known = held_out_shape(config)
    return torch.zeros(batch_size, rows if known else config.data.lookback, columns, device=device)


def quantiles_of(config: DictConfig) -> list[float]:
    """Return the quantiles that the model forecasts; empty if it forecasts one value."""
    return list(config.loss.quantiles) if config.loss.name == "quantile" else []


def make_statistics(_: DictConfig, sources: Mapping[str, Windows], *__: Any) -> dict[str, Any]:
    """Return what the task takes from the data: the rows of a season, and what each series is standardised by."""
    series = sources["train"].series
    table, values = series.table, series.statistics
    standards = {
        table.names[at]: {key: values[key][at].tolist() for key in ("mean", "std")}
        | {"step": steady_step(table.dates[table.begins[at] : table.ends[at]])}
        for at in np.flatnonzero(series.counts["train"]).tolist()
    }
    return {"season": series.season, "series": standards}


def recorded_statistics(config: DictConfig, recorded: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a run's metrics.json holds of `make_statistics`, None for nothing; raise a SegFitError for anything else."""
    if "season" not in recorded:
        return None
    season = recorded["season"]
    if not (isinstance(season, int) and 1 <= season <= config.data.lookback):
        raise SegFitError(f"season must be from 1 to data.lookback={config.data.lookback}.")
    return {"season": season, "series": recorded.get("series", {})}


def make_task(
    config: DictConfig, _: torch.device, statistics: Mapping[str, Any] | None = None, **shared: Any
) -> ForecastingTask:
    """Return what a batch means under a config; `shared` are fields of `ScoredTask`."""
    return ForecastingTask(
        layout_of(config.data),
        config.data.lookback,
        config.data.horizon,
        criterion=ForecastLoss(config.loss.name, config.loss.delta, quantiles_of(config)),
        season=(statistics or {}).get("season", 1),
        standards=(statistics or {}).get("series", {}),
        returns=config.data.returns,
        **shared,
    )


def make_extra_metrics(config: DictConfig) -> list[ExtraMetric]:
    """Return the metrics of `metrics.extra`, each of which has scored an example; raise a SegFitError with all problems."""
    example = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    return checked_metrics(
        plain(config.metrics)["extra"], ("regression",), _SCORES, lambda _: tuple(example)
    )


def apply_options(_: DictConfig, options: DictConfig, *__: Any) -> None:
    """Evaluate the windows at the end of the series, if the future is asked for."""
    if options.future:
        options.split = "future"


def facts(config: DictConfig, sources: Mapping[str, Windows]) -> dict[str, str]:
    """Return what really runs, label → text, that only this task knows."""
    layout, table = layout_of(config.data), sources["train"].series.table
    step = int(np.median(np.diff(table.dates[table.begins[-1] : table.ends[-1]])))
    first, last = (date_text(end(table.dates)) for end in (np.min, np.max))
    shown = ", ".join(layout.columns[: min(layout.targets, 8)])
    return {
        "dates": f"{first} to {last}, mostly {np.timedelta64(step, 's').item()} apart",
        "targets": f"{layout.targets} ({shown}{', …' if layout.targets > 8 else ''})",
        "other inputs": f"{layout.inputs - layout.targets}, {layout.known} known in advance",
    }
