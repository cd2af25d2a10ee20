"""AR-Net: against least squares, its penalty against the formula, and the batch of networks against one alone."""

from __future__ import annotations

import math

import pytest
import torch

from ostinato.errors import ConfigurationError, DataError, DivergenceError
from ostinato.models.ar_net import ARNet, SparsityPenalty, fit_ar_nets
from ostinato.models.autoregression import fit_ols_ar
from ostinato.tasks.autoregression import SPARSE_COEFFICIENTS, simulate_ar, stpe


@pytest.fixture(scope="module")
def series() -> torch.Tensor:
    return torch.from_numpy(simulate_ar(SPARSE_COEFFICIENTS, 3000, [0, 1])).float()


def test_penalty_is_the_formula() -> None:
    penalty = SparsityPenalty(0.1, c_lambda=0.02, c1=2, c2=2)
    assert penalty.strength == pytest.approx(0.02 * 9)
    weights = torch.tensor([0.5, -0.1, 0.0])
    expected = sum(2 / (1 + math.exp(-2 * (abs(w) + 1e-8) ** 0.5)) - 1 for w in (0.5, 0.1, 0.0)) / 3
    assert float(penalty.regulariser(weights)) == pytest.approx(expected, rel=1e-4)
    assert penalty.regulariser(torch.tensor([50.0])) == pytest.approx(1, abs=1e-5)
    zero = torch.zeros(3, requires_grad=True)
    penalty.regulariser(zero).backward()
    assert zero.grad is not None and torch.isfinite(zero.grad).all()
    assert SparsityPenalty(1.0).strength == 0
    with pytest.raises(ConfigurationError, match="share of the lags"):
        SparsityPenalty(0.0)
    with pytest.raises(ConfigurationError, match="ramp"):
        SparsityPenalty(0.5, ramp="steep")


def test_ramps() -> None:
    linear = SparsityPenalty(0.5, c_lambda=1.0)
    quadratic = SparsityPenalty(0.5, c_lambda=1.0, ramp="quadratic")
    assert [linear.at(epoch, 5) for epoch in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [quadratic.at(epoch, 5) for epoch in range(5)] == pytest.approx([0, 0.25, 1, 1, 1])


def test_without_penalty_it_is_least_squares(series: torch.Tensor) -> None:
    model = ARNet(4)
    losses = model.fit(series[0], epochs=60, learning_rate=1e-2, decay=0.9, batch_size=64)
    torch.testing.assert_close(
        model.coefficients[0].double(), fit_ols_ar(series[0], 4).coefficients, atol=0.002, rtol=0
    )
    assert losses[-1] < losses[0] and losses[-1] == pytest.approx(1, abs=0.1)


def test_the_penalty_finds_the_lags(series: torch.Tensor) -> None:
    weights, intercepts = fit_ar_nets(
        series, [3, 40], [None, SparsityPenalty(3 / 40, c_lambda=0.03)], epochs=15, learning_rate=1e-2, batch_size=64
    )
    assert weights.shape == (2, 2, 40) and intercepts.shape == (2, 2)
    assert (weights[:, 0, 3:] == 0).all()
    for member in range(2):
        ours = stpe(weights[member, 1].numpy(), SPARSE_COEFFICIENTS)
        theirs = stpe(fit_ols_ar(series[member], 40).coefficients.numpy(), SPARSE_COEFFICIENTS)
        assert ours < 0.6 * theirs
    with pytest.raises(ConfigurationError, match="one penalty"):
        fit_ar_nets(series, [3, 4], [None])


def test_networks_of_one_batch_do_not_touch(series: torch.Tensor) -> None:
    penalty = SparsityPenalty(0.3)
    options = {"epochs": 2, "batch_size": 500, "learning_rate": 1e-2}
    both, _ = fit_ar_nets(series, [6], [penalty], **options)
    alone, _ = fit_ar_nets(series[:1], [6], [penalty], **options)
    torch.testing.assert_close(both[:1], alone)


def test_prediction_rolls_out(series: torch.Tensor) -> None:
    history = series[0, :10]
    for model in (ARNet(3), ARNet(3, n_forecasts=2, hidden=(5,))):
        made = model.predict(history, 5)
        first = model(history[-3:].flip(0))
        torch.testing.assert_close(made[: model.n_forecasts], first.detach())
        lags = torch.cat([history, first])[-3:].flip(0)
        torch.testing.assert_close(made[model.n_forecasts], model(lags)[0].detach())
        assert made.shape == (5,)
    with pytest.raises(DataError, match="shorter"):
        model.predict(history[:2], 1)


def test_hidden_layers_have_no_coefficients(series: torch.Tensor) -> None:
    model = ARNet(3, n_forecasts=2, hidden=(5,))
    losses = model.fit(series[0], epochs=2, penalty=SparsityPenalty(0.5))
    assert losses[1] < losses[0]
    with pytest.raises(ConfigurationError, match="hidden"):
        _ = model.coefficients
    with pytest.raises(ConfigurationError):
        ARNet(0)


def test_divergence_is_an_error() -> None:
    with pytest.raises(DivergenceError, match="standardise"):
        ARNet(2).fit(torch.full((20,), float("inf")), epochs=1)
