import numpy as np
import pytest
import torch
from torchmetrics.functional import mean_absolute_error, mean_squared_error

from segfit.tasks.forecasting.metrics import ForecastMetrics, direction_scores, error_table
from segfit.tasks.forecasting.schema import FORECASTERS, error_names, remark
from segfit.tasks.scored import merge, state_of

WINDOWS, LOOKBACK, HORIZON, TARGETS, SEASON = 23, 10, 6, 2, 4


def windows(seed=0):
    draw = torch.Generator().manual_seed(seed)
    series = torch.randn(WINDOWS, LOOKBACK + HORIZON, TARGETS, generator=draw)
    return {
        "forecast": torch.randn(WINDOWS, HORIZON, TARGETS, generator=draw),
        "truth": series[:, LOOKBACK:],
        "past": series[:, :LOOKBACK],
        "mean": torch.randn(WINDOWS, TARGETS, generator=draw),
        "std": 1 + torch.rand(WINDOWS, TARGETS, generator=draw),
        "scale": 1 + torch.rand(WINDOWS, TARGETS, generator=draw),
        "when": torch.arange(WINDOWS) // 3,
    }


def metrics(returns=False, season=SEASON):
    return ForecastMetrics(HORIZON, TARGETS, returns=returns, season=season)


def scored(batches, **options):
    metric = metrics(**options)
    for batch in batches:
        metric.update(**batch)
    return metric.scores()


def split(data, *sizes):
    parts = [part.split(sizes) for part in data.values()]
    return [dict(zip(data, part, strict=True)) for part in zip(*parts, strict=True)]


def test_errors_are_those_of_torchmetrics_over_all_windows():
    data = windows()
    repeated = data["past"][:, [-1]].expand(-1, HORIZON, -1)
    season = data["past"][:, -SEASON:].repeat(1, 2, 1)[:, :HORIZON]
    scores = scored(split(data, 10, 10, 3))[0]
    for suffix, forecast in (("", data["forecast"]), ("_last", repeated), ("_season", season)):
        truth = data["truth"]
        pair = forecast.contiguous(), truth.contiguous()
        true = [part * data["std"][:, None] for part in pair]
        assert scores[f"mse{suffix}"] == pytest.approx(mean_squared_error(*pair).item())
        assert scores[f"mae{suffix}"] == pytest.approx(mean_absolute_error(*pair).item())
        assert scores[f"true_mse{suffix}"] == pytest.approx(mean_squared_error(*true).item())
        assert scores[f"true_mae{suffix}"] == pytest.approx(mean_absolute_error(*true).item())
        error = (forecast - truth).abs() * data["std"][:, None] / data["scale"][:, None]
        assert scores[f"mase{suffix}"] == pytest.approx(error.double().mean().item())


def test_errors_by_step_are_means_over_windows_and_targets():
    data = windows()
    found = scored([data])[1]
    expected = (data["forecast"] - data["truth"]).double().square().mean((0, 2))
    np.testing.assert_allclose(found["model"], expected.numpy(), rtol=1e-6)
    assert [*found] == ["model", "last", "season"]
    assert [*scored([data], season=1)[1]] == ["model", "last"]


@pytest.mark.parametrize("returns", [False, True])
def test_batches_and_processes_make_no_difference(returns):
    data = windows()
    whole = scored([data], returns=returns)
    for sizes in ([23], [1] * 23, [20, 3]):
        found = scored(split(data, *sizes), returns=returns)
        assert found[0] == pytest.approx(whole[0], rel=1e-12)
    states = []
    for part in split(data, 9, 14):
        metric = metrics(returns=returns)
        metric.update(**part)
        states.append(state_of(metric))
    merged = metrics(returns=returns)
    merge(merged, states)
    assert merged.scores()[0] == pytest.approx(whole[0], rel=1e-12)


def test_the_sums_of_windows_make_up_the_scores():
    metric = metrics()
    metric.update(**windows())
    assert metric.last.shape == (WINDOWS, 15)
    means = (metric.last.sum(0) / (WINDOWS * HORIZON * TARGETS)).tolist()
    assert dict(zip(error_names(FORECASTERS), means, strict=True)) == pytest.approx(
        metric.scores()[0]
    )


def test_nothing_counted_is_nan():
    scores = metrics(returns=True).scores()[0]
    assert all(np.isnan(value) for value in scores.values())


def test_the_last_price_repeated_is_a_return_of_zero():
    data = windows()
    scores = scored([data], returns=True)[0]
    true = data["truth"] * data["std"][:, None] + data["mean"][:, None]
    assert scores["true_mse_last"] == pytest.approx(true.square().mean().item(), rel=1e-5)


def test_directions_are_scored_by_date():
    draw = np.random.default_rng(0)
    happened = draw.normal(size=(40, 5))
    predicted = happened + draw.normal(size=(40, 5))
    happened[1, 2] = 0.0
    order = draw.permutation(200)
    dates = np.repeat(np.arange(40), 5)[order]
    found = direction_scores(dates, predicted.ravel()[order], happened.ravel()[order], 4)
    correlations = [np.corrcoef(*rows)[0, 1] for rows in zip(predicted, happened, strict=True)]
    right = np.where(happened == 0, np.nan, np.sign(predicted) == np.sign(happened))
    hits = np.nanmean(right, axis=1)
    assert found == pytest.approx({
        "ic": np.mean(correlations), "ic_se": np.std(correlations, ddof=1) / np.sqrt(10),
        "hit_rate": hits.mean(), "hit_rate_se": hits.std(ddof=1) / np.sqrt(10),
    })  # fmt: skip


def test_forecasts_of_a_random_walk_have_no_information_and_planted_ones_have():
    draw = np.random.default_rng(1)
    dates, happened = np.repeat(np.arange(300), 8), draw.normal(size=2400)
    chance = direction_scores(dates, draw.normal(size=2400), happened, 1)
    assert abs(chance["ic"]) < 2 * chance["ic_se"]
    assert abs(chance["hit_rate"] - 0.5) < 2 * chance["hit_rate_se"]
    planted = direction_scores(dates, happened + draw.normal(size=2400), happened, 1)
    assert planted["ic"] == pytest.approx(np.sqrt(0.5), abs=0.05)
    assert planted["hit_rate"] - 0.5 > 10 * planted["hit_rate_se"]


def test_a_single_series_is_correlated_over_time():
    draw = np.random.default_rng(2)
    predicted, happened = draw.normal(size=(2, 100))
    found = direction_scores(np.arange(100.0), predicted, happened, 1)
    assert found["ic"] == pytest.approx(np.corrcoef(predicted, happened)[0, 1])
    assert found["ic_se"] == pytest.approx(0.1, abs=0.01)


def test_the_table_and_the_remark_name_the_naive_forecasts():
    data = windows()
    scores = scored([data])[0]
    assert [row[0] for row in error_table(scores).rows] == ["model", "last value", "last season"]
    best = {**scores, "mse": 0.1, "mse_last": 0.2, "mse_season": 0.3}
    assert remark(best) == ""
    assert "repeating the last value" in remark({**best, "mse_last": 0.05})
    assert "season" not in remark({**best, "mse_last": 0.05})
