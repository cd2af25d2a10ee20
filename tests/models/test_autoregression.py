"""Classical autoregression against NumPy's least squares and against known processes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ostinato.errors import ConfigurationError, DataError
from ostinato.models.autoregression import (
    Autoregression,
    fit_ols_ar,
    fit_yule_walker,
    forecast,
    impulse_response,
    lag_windows,
    one_step,
    spectral_radius,
    spectrum,
)
from ostinato.tasks.autoregression import simulate_ar

WEIGHTS = torch.tensor([0.2, 0.3, -0.5], dtype=torch.float64)


def test_windows_are_latest_first() -> None:
    windows, targets = lag_windows(torch.arange(6.0), 2, 2)
    assert windows.tolist() == [[3, 2], [2, 1], [1, 0]]
    assert targets.tolist() == [[4, 5], [3, 4], [2, 3]]
    assert lag_windows(torch.zeros(3, 6), 2)[0].shape == (3, 4, 2)
    with pytest.raises(DataError, match="3 values has no window of 3 lags"):
        lag_windows(torch.zeros(3), 3)
    with pytest.raises(ConfigurationError):
        lag_windows(torch.zeros(3), 0)


def test_least_squares() -> None:
    series = torch.from_numpy(simulate_ar(WEIGHTS.numpy(), 300, 0)) + 2
    fitted = fit_ols_ar(series, 5)
    rows = np.array([[*series[t - 5 : t].flip(0).tolist(), 1.0] for t in range(5, 300)])
    expected = np.linalg.lstsq(rows, series[5:].numpy(), rcond=None)[0]
    np.testing.assert_allclose([*fitted.coefficients, fitted.intercept], expected, atol=1e-10)
    np.testing.assert_allclose(one_step(fitted, series), rows @ expected, atol=1e-10)
    with pytest.raises(DataError, match="dependent"):
        fit_ols_ar(torch.ones(50), 3)
    with pytest.raises(DataError, match="unknowns"):
        fit_ols_ar(torch.randn(8), 5)


def test_yule_walker_solves_the_toeplitz_system() -> None:
    series = torch.from_numpy(simulate_ar(WEIGHTS.numpy(), 400, 1)) + 3
    fitted = fit_yule_walker(series, 4)
    centred = (series - series.mean()).numpy()
    covariance = np.array([(centred[k:] * centred[: 400 - k]).sum() / 400 for k in range(5)])
    toeplitz = covariance[np.abs(np.subtract.outer(np.arange(4), np.arange(4)))]
    np.testing.assert_allclose(fitted.coefficients, np.linalg.solve(toeplitz, covariance[1:]), atol=1e-10)
    assert float(fitted.intercept / (1 - fitted.coefficients.sum())) == pytest.approx(float(series.mean()))
    assert spectral_radius(fitted.coefficients) < 1
    with pytest.raises(DataError, match="constant"):
        fit_yule_walker(torch.ones(9), 2)
    with pytest.raises(DataError, match="9 values"):
        fit_yule_walker(torch.ones(9), 9)


def test_forecasts_become_lags() -> None:
    fitted = Autoregression(torch.tensor([1.0, 1.0]), torch.tensor(0.5))
    assert forecast(fitted, torch.tensor([9.0, 1.0, 2.0]), 3).tolist() == [3.5, 6.0, 10.0]
    with pytest.raises(DataError, match="shorter"):
        forecast(fitted, torch.zeros(1), 1)


def test_impulse_and_spectrum() -> None:
    response = impulse_response(WEIGHTS, 400)
    assert response[:4].tolist() == pytest.approx([1, 0.2, 0.34, 0.2 * 0.34 + 0.3 * 0.2 - 0.5])
    frequencies = torch.arange(201, dtype=torch.float64) / 400
    expected = torch.fft.rfft(response).abs().square()
    torch.testing.assert_close(spectrum(WEIGHTS, frequencies), expected, rtol=1e-6, atol=1e-6)
    assert spectral_radius(torch.tensor([0.0, 0.81])) == pytest.approx(0.9)
