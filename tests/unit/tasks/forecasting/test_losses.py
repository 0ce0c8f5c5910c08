import numpy as np
import pytest
import torch
from torch.nn import functional as F

from segfit.tasks.forecasting.task import ForecastLoss

QUANTILES = (0.1, 0.5, 0.8)
LOSSES = [
    ForecastLoss("mse"), ForecastLoss("mae"), ForecastLoss("huber", delta=0.5),
    ForecastLoss("quantile", quantiles=QUANTILES),
]  # fmt: skip
every_loss = pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)


def batch(loss, size=6):
    generator = torch.Generator().manual_seed(size)
    outputs = torch.randn(
        size, 5, 2, *([len(loss.quantiles)] if loss.quantiles else []), generator=generator
    )
    return outputs, torch.randn(size, 5, 2, generator=generator)


def value(loss, outputs, targets):
    return loss(outputs, targets, loss.totals(targets))


@every_loss
def test_is_the_mean_that_its_name_says(loss):
    outputs, targets = batch(loss)
    expected = {
        "mse": lambda: F.mse_loss(outputs, targets),
        "mae": lambda: F.l1_loss(outputs, targets),
        "huber": lambda: F.huber_loss(outputs, targets, delta=0.5),
        "quantile": lambda: torch.tensor(pinball(outputs.numpy(), targets.numpy())),
    }[loss.name]()
    torch.testing.assert_close(value(loss, outputs, targets), expected, check_dtype=False)


def pinball(outputs, targets):
    error = targets[..., None] - outputs
    quantiles = np.array(QUANTILES)
    return np.where(error > 0, quantiles * error, (quantiles - 1) * error).mean()


@every_loss
def test_accumulated_micro_batches_have_the_loss_and_gradient_of_one_big_batch(loss):
    outputs, targets = batch(loss, size=7)
    big, small = outputs.clone().requires_grad_(), outputs.clone().requires_grad_()
    whole = value(loss, big, targets)
    whole.backward()
    pieces = list(zip(small.split([4, 2, 1]), targets.split([4, 2, 1]), strict=True))
    totals = torch.stack([loss.totals(part) for _, part in pieces]).sum(0)
    parts = [loss(*piece, totals) for piece in pieces]
    torch.stack(parts).sum().backward()
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(small.grad, big.grad)


def test_the_quantile_loss_is_least_at_the_quantiles_of_the_truth():
    targets = torch.distributions.Exponential(1.0).icdf(torch.linspace(0, 1, 2002)[1:-1])
    outputs = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([outputs], lr=0.3)
    for _ in range(400):
        loss = value(LOSSES[-1], outputs.expand(2000, 1, 1, 3), targets.view(-1, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = -np.log(1 - np.array(QUANTILES))
    np.testing.assert_allclose(outputs.detach().numpy(), expected, atol=0.02)


def test_one_forecast_of_several_is_the_median():
    outputs, _ = batch(LOSSES[-1])
    assert torch.equal(LOSSES[-1].point(outputs), outputs[..., 1])
    assert torch.equal(LOSSES[0].point(outputs), outputs)
