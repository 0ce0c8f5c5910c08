"""How far forecasts are off, beside two naive ones; its import takes seconds, torchmetrics'."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from segfit.engine.findings import Cell, Column, Table
from segfit.report.text import number
from segfit.tasks.forecasting.schema import ERRORS, FORECASTERS, error_names, remark

Vector = NDArray[np.float64]

LEAST_SERIES = 3  # a date has for a correlation


class ForecastMetrics(Metric):
    """Sums of errors over all windows, for the model, repeating the last value, and repeating the last season.

    Sums are float64: they do not depend on the batch size. An update never waits for the device. `season` are its steps, 1:
    there is none, and no seasonal forecast. `returns` are those of prices: the last price repeated is one of 0, and directions
    are scored.
    """

    full_state_update = False
    sums: Tensor  # (forecasters, errors)
    squared: Tensor  # (forecasters, horizon)
    windows: Tensor
    moves: list[Tensor]

    def __init__(self, horizon: int, targets: int, *, returns: bool, season: int) -> None:
        super().__init__(sync_on_compute=False)
        self.horizon, self.targets, self.returns, self.season = horizon, targets, returns, season
        self.names = tuple(FORECASTERS)[: 3 if season > 1 else 2]
        for state, width in (("sums", len(ERRORS)), ("squared", horizon)):
            zeros = torch.zeros(len(self.names), width, dtype=torch.float64)
            self.add_state(state, zeros, dist_reduce_fx="sum")
        self.add_state("windows", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("moves", [], dist_reduce_fx="cat")

    def update(
        self,
        forecast: Tensor,  # (B, horizon, targets) float32, standardised
        truth: Tensor,  # the same
        *,
        mean: Tensor,  # (B, targets), of the training part of each window's series
        std: Tensor,  # the same
        scale: Tensor,  # (B, targets), error of the seasonal forecast of one step there, for MASE
        past: Tensor,  # (B, lookback, targets) standardised; lookback ≥ season
        when: Tensor,  # (B,) int64, the date of the first step
    ) -> None:
        """Count a batch; `last` then holds the sums of each window, (B, forecasters · errors) float64."""
        naive = [(-mean / std).unsqueeze(1) if self.returns else past[:, -1:]]
        if self.season > 1:
            repeats = -(-self.horizon // self.season)
            naive.append(past[:, -self.season :].repeat(1, repeats, 1)[:, : self.horizon])
        errors = torch.stack([forecast, *(each.expand_as(truth) for each in naive)]) - truth
        true = errors * std.unsqueeze(1)
        scaled = true.abs() / scale.unsqueeze(1)
        parts = errors.square(), errors.abs(), true.square(), true.abs(), scaled  # as in `ERRORS`
        each = torch.stack([part.sum((2, 3), dtype=torch.float64) for part in parts], 2)
        self.last = each.transpose(0, 1).flatten(1)
        self.sums += each.sum(1)
        self.squared += parts[0].sum((1, 3), dtype=torch.float64)
        self.windows += len(truth)
        if self.returns:
            both = torch.stack([forecast, truth]) * std.unsqueeze(1) + mean.unsqueeze(1)
            predicted, happened = both.sum(2, dtype=torch.float64)
            dates = when.double().unsqueeze(1).expand_as(predicted)
            self.moves.append(torch.stack([dates, predicted, happened], 2).flatten(0, 1))

    def scores(self) -> tuple[dict[str, float], dict[str, Vector]]:
        """Return the scores of the state as it is, merged or not; NaN if nothing was counted. Waits for the device.

        They are `ERRORS`, with _last and _season too, and of returns ic, hit_rate, and with _se. The mean squared errors by
        step on standardised values, forecaster → `(horizon,)`, come second.
        """
        values = self.windows * self.targets
        means = (self.sums / (values * self.horizon)).flatten().tolist()
        scores = dict(zip(error_names(self.names), means, strict=True))
        if self.returns:
            moves = torch.cat(self.moves) if self.moves else torch.zeros(0, 3)
            dates, predicted, happened = moves.double().cpu().numpy().T
            scores |= direction_scores(dates, predicted, happened, self.horizon)
        by_step = (self.squared / values).cpu().numpy()
        return scores, dict(zip(self.names, by_step, strict=True))

    compute = scores


def direction_scores(
    dates: Vector, predicted: Vector, happened: Vector, horizon: int
) -> dict[str, float]:
    """Return how well forecasts of returns, `(N,)` each over the whole horizon, order series and predict directions.

    `ic`, the information coefficient, is the mean over dates of the correlation between predicted and real returns of that
    date's series (Grinold, 1989); where no date has three series, the correlation over time. `hit_rate` is the mean over
    dates of the share of returns whose sign was right; returns of 0 do not count. Series of one date move together, and
    returns over a horizon overlap those of the next dates, so that the standard errors, `ic_se` and `hit_rate_se`, count
    one date in `horizon` as independent.
    """
    _, group = np.unique(dates, return_inverse=True)
    count = np.bincount(group)

    def mean(values: Vector) -> Vector:
        return np.bincount(group, values) / count

    # Not above 0: rounding leaves something of a return of 0.
    moved = np.abs(happened) > 1e-6 * np.abs(happened).max(initial=0.0)
    right = np.bincount(group, moved & (np.sign(predicted) == np.sign(happened)))
    with np.errstate(invalid="ignore", divide="ignore"):
        hits = right / np.bincount(group, moved)
        first, second = predicted - mean(predicted)[group], happened - mean(happened)[group]
        correlations = mean(first * second) / np.sqrt(mean(first**2) * mean(second**2))
    correlations = correlations[(count >= LEAST_SERIES) & np.isfinite(correlations)]
    if len(correlations):
        ic, ic_se = _mean_and_error(correlations, horizon)
    else:
        both = len(count) > 2 and predicted.std() > 0 and happened.std() > 0
        ic = float(np.corrcoef(predicted, happened)[0, 1]) if both else float("nan")
        ic_se = float(np.sqrt((1 - ic**2) * horizon / max(len(count), 1)))
    hit_rate, hit_rate_se = _mean_and_error(hits[np.isfinite(hits)], horizon)
    return {"ic": ic, "ic_se": ic_se, "hit_rate": hit_rate, "hit_rate_se": hit_rate_se}


def _mean_and_error(by_date: Vector, horizon: int) -> tuple[float, float]:
    if len(by_date) < 2:
        return float(by_date.mean()) if len(by_date) else float("nan"), float("nan")
    return float(by_date.mean()), float(by_date.std(ddof=1) * np.sqrt(horizon / len(by_date)))


def error_table(scores: Mapping[str, float]) -> Table:
    """Return the errors of the model and of the naive forecasts, a row each; what else there is to say is below."""
    names = {label: error_names([name]) for name, label in FORECASTERS.items()}
    rows: list[list[Cell]] = [
        [label, *(scores[key] for key in keys)]
        for label, keys in names.items()
        if keys[0] in scores
    ]
    columns = [Column("forecast"), *(Column(label, ".4g") for label in ERRORS.values())]
    texts = [
        f"{label} {number(scores[name])} ± {number(scores[f'{name}_se'])} (standard error)."
        for name, label in (("ic", "IC"), ("hit_rate", "Hit rate"))
        if name in scores
    ]
    caption = " ".join([*texts, remark(scores)])
    return Table("errors", "", columns, rows, emphasis=0, caption=caption)
