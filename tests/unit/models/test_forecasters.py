import numpy as np
import pytest
import torch

from segfit.models.forecasters import Forecaster

LOOKBACK, HORIZON, TARGETS = 30, 7, 3
OPTIONS = {
    "lstm": {"name": "lstm", "hidden_size": 16, "num_layers": 2, "dropout": 0.1, "patch": 0, "revin": True},
    "patch lstm": {"name": "lstm", "hidden_size": 16, "num_layers": 1, "dropout": 0.1, "patch": 8, "revin": True},
    "mixed lstm": {
        **{"name": "lstm", "hidden_size": 16, "num_layers": 1, "dropout": 0.0, "patch": 0, "revin": False},
        "mixed": True,
    },
    "transformer": {
        **{"name": "transformer", "hidden_size": 16, "num_layers": 2, "num_heads": 4, "dropout": 0.1},
        **{"patch": 8, "revin": True},
    },
    "layer norms": {
        **{"name": "transformer", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "dropout": 0.0},
        **{"patch": 4, "revin": False, "norm": "layer"},
    },
    "nlinear": {"name": "linear", "kind": "nlinear"},
    "dlinear": {"name": "linear", "kind": "dlinear"},
}  # fmt: skip
every_model = pytest.mark.parametrize("name", OPTIONS)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def make(name, *, inputs=0, known=0, quantiles=0, **options):
    sizes = {
        "lookback": LOOKBACK,
        "horizon": HORIZON,
        "targets": TARGETS,
        "channels": TARGETS + inputs,
    }
    options = {**OPTIONS[name], **options}
    return Forecaster(options, **sizes, known=known, quantiles=quantiles).eval()


def window(batch=4, *, inputs=0, known=0):
    steps = LOOKBACK + (HORIZON if known else 0)
    return torch.randn(batch, steps, TARGETS + inputs + known).cumsum(1)


@every_model
@pytest.mark.parametrize("inputs", [0, 2])
@pytest.mark.parametrize("known", [0, 1])
@pytest.mark.parametrize("quantiles", [0, 3])
def test_forecasts_every_step_of_every_target(name, inputs, known, quantiles):
    model = make(name, inputs=inputs, known=known, quantiles=quantiles)
    forecast = model(window(inputs=inputs, known=known))
    assert forecast.shape == (4, HORIZON, TARGETS, *([quantiles] if quantiles else []))
    assert forecast.dtype == torch.float32
    forecast.square().mean().backward()
    unreached = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or not parameter.grad.any()
    ]
    assert unreached == []


@every_model
def test_sees_of_the_future_what_is_known_in_advance_alone(name):
    model = make(name, inputs=1, known=2)
    before = window(inputs=1, known=2)
    forecast = model(before)
    for columns, seen in ((slice(0, TARGETS + 1), False), (slice(TARGETS + 1, None), True)):
        after = before.clone()
        after[:, LOOKBACK:, columns] += 1
        assert torch.equal(model(after), forecast) != seen
    for columns in (TARGETS, TARGETS + 1):  # another input, a known one: their past is seen
        after = before.clone()
        after[:, LOOKBACK // 2, columns] += 1
        assert not torch.equal(model(after), forecast)


@every_model
def test_windows_do_not_influence_each_other(name):
    model, batch = make(name, known=1), window(known=1)
    torch.testing.assert_close(model(batch)[:1], model(batch[:1]))


@every_model
def test_targets_see_each_other_if_mixed_alone(name):
    before, model = window(), make(name)
    after = before.clone()
    after[..., 0] += torch.randn(LOOKBACK)
    forecast, other = model(before), model(after)
    assert not torch.equal(forecast[..., 0], other[..., 0])
    assert torch.equal(forecast[..., 1:], other[..., 1:]) != (name == "mixed lstm")


@pytest.mark.parametrize("name", ["lstm", "patch lstm", "transformer"])
def test_with_revin_forecasts_follow_level_and_scale(name):
    model, series = make(name), window()
    torch.testing.assert_close(model(5 * series - 30), 5 * model(series) - 30, rtol=1e-3, atol=1e-2)


@every_model
def test_a_constant_window_is_forecast_without_nan(name):
    assert make(name)(torch.full((2, LOOKBACK, TARGETS), 3.0)).isfinite().all()


def test_a_single_window_of_a_single_token_trains():
    model = make("transformer", patch=LOOKBACK).train()
    assert model(window(1)[..., :TARGETS]).isfinite().all()


@pytest.mark.parametrize("name", ["lstm", "layer norms", "nlinear"])
def test_without_batch_norm_parts_of_a_batch_have_its_gradient(name):
    model, batch = make(name, dropout=0.0) if name == "lstm" else make(name), window(6)
    model.train()
    gradients = []
    for size in (6, 2):
        model.zero_grad()
        for part in batch.split(size):
            model(part).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_nlinear_is_a_line_through_what_is_left_of_the_last_value():
    model, series = make("nlinear"), window()
    weight, bias = (part.detach().double().numpy() for part in model.head[1].parameters())
    values = series.double().numpy()
    last = values[:, -1:]
    expected = np.einsum("blt,hl->bht", values - last, weight) + bias[:, None] + last
    np.testing.assert_allclose(model(series).detach().numpy(), expected, atol=1e-4)


def test_dlinear_is_a_line_through_the_trend_and_one_through_the_rest():
    model, series = make("dlinear"), window()
    weight, bias = (part.detach().double().numpy() for part in model.head[1].parameters())
    values = series.double().numpy()
    ends = np.pad(values, [(0, 0), (12, 12), (0, 0)], mode="edge")
    trend = np.stack([ends[:, at : at + 25].mean(1) for at in range(LOOKBACK)], 1)
    expected = np.einsum("blt,hl->bht", trend, weight[:, :LOOKBACK]) + bias[:, None]
    expected += np.einsum("blt,hl->bht", values - trend, weight[:, LOOKBACK:])
    np.testing.assert_allclose(model(series).detach().numpy(), expected, atol=1e-4)
