"""Classical autoregression: y_t = c + Σ_i w_i y_{t−i}, fitted in closed form, rolled out, and analysed.

    fitted = fit_ols_ar(series, order=10)
    forecast(fitted, series, steps=12)
    spectral_radius(fitted.coefficients)     # below 1: the process is stable

These are the references that a trained network is held against (`ostinato.models.ar_net`). coefficients[0] belongs to
the latest value. Computed in float64 whatever comes in.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ostinato.errors import ConfigurationError, DataError


class Autoregression(NamedTuple):
    """ŷ_t = intercept + Σ_i coefficients[i] y_{t−1−i}."""

    coefficients: Float[Tensor, " order"]
    intercept: Float[Tensor, ""]


def lag_windows(
    series: Float[Tensor, "*members length"], order: int, n_forecasts: int = 1
) -> tuple[Float[Tensor, "*members rows order"], Float[Tensor, "*members rows n_forecasts"]]:
    """Every window of `order` values, the latest first, and the `n_forecasts` values that follow it, in time order.

    Rows run from the latest window to the earliest: so the windows are a view, and no lag is copied. There are
    length − order − n_forecasts + 1. Raises `DataError` for a series without a single row.
    """
    if order < 1 or n_forecasts < 1:
        raise ConfigurationError(f"order and n_forecasts must be at least 1, got {order} and {n_forecasts}")
    if series.shape[-1] < order + n_forecasts:
        raise DataError(
            f"a series of {series.shape[-1]} values has no window of {order} lags and {n_forecasts} to forecast; "
            "pass a longer one or lower the order"
        )
    latest_first = series.flip(-1)
    windows = latest_first[..., n_forecasts:].unfold(-1, order, 1)
    targets = latest_first.unfold(-1, n_forecasts, 1)[..., : windows.shape[-2], :].flip(-1)
    return windows, targets


def fit_ols_ar(series: Float[Tensor, " length"], order: int) -> Autoregression:
    """Least squares by the normal equations of the lag matrix with a column of ones: O(N p²) time, O(p²) memory.

    Blocks of rows are added up, so that the lag matrix is never whole. Raises `DataError` for fewer rows than
    unknowns, or for a series whose lags are exactly dependent.
    """
    values = series.double()
    windows, targets = lag_windows(values, order)
    if windows.shape[0] < order + 1:
        raise DataError(
            f"{windows.shape[0]} rows do not determine {order + 1} unknowns; pass a longer series or lower the order"
        )
    gram = values.new_zeros(order + 1, order + 1)
    moment = values.new_zeros(order + 1, 1)
    for rows, wanted in zip(windows.split(4096), targets.split(4096), strict=True):
        design = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        gram += design.T @ design
        moment += design.T @ wanted
    factor, failed = torch.linalg.cholesky_ex(gram)
    if failed:
        raise DataError("the lags of this series are linearly dependent (is it constant, or exactly periodic?)")
    solution = torch.cholesky_solve(moment, factor).squeeze(-1)
    return Autoregression(solution[:-1], solution[-1])


def fit_yule_walker(series: Float[Tensor, " length"], order: int) -> Autoregression:
    """The coefficients whose process has the series' own autocovariances: O(N log N + p²), and always stable.

    Autocovariances (divided by N) by FFT, then Levinson and Durbin's recursion. Raises `DataError` for a series not
    longer than the order, or constant.
    """
    values = series.double()
    length = len(values)
    if length <= order:
        raise DataError(f"{length} values do not determine {order} coefficients; pass a longer series")
    mean = values.mean()
    transform = torch.fft.rfft(values - mean, 2 * length)
    covariance = torch.fft.irfft(transform.abs().square(), 2 * length)[: order + 1] / length
    if covariance[0] <= 0:
        raise DataError("a constant series has no autocovariance to fit")
    weights = values.new_zeros(0)
    error = covariance[0]
    for k in range(order):
        reflection = (covariance[k + 1] - weights @ covariance[1 : k + 1].flip(0)) / error
        weights = torch.cat([weights - reflection * weights.flip(0), reflection[None]])
        error = error * (1 - reflection.square())
    return Autoregression(weights, mean * (1 - weights.sum()))


def one_step(fitted: Autoregression, series: Float[Tensor, " length"]) -> Float[Tensor, " rows"]:
    """The forecast of every value of `series` from the order-th on, each from the values just before it."""
    windows, _ = lag_windows(series.to(fitted.coefficients), len(fitted.coefficients))
    return (windows @ fitted.coefficients + fitted.intercept).flip(0)


def forecast(fitted: Autoregression, history: Float[Tensor, " length"], steps: int) -> Float[Tensor, " steps"]:
    """The next `steps` values: each forecast is a lag of the next. Raises `DataError` for too short a history."""
    order = len(fitted.coefficients)
    if len(history) < order:
        raise DataError(f"a history of {len(history)} values is shorter than the order {order}")
    lags = history.to(fitted.coefficients)[len(history) - order :].flip(0)
    made = []
    for _ in range(steps):
        value = fitted.intercept + fitted.coefficients @ lags
        made.append(value)
        lags = torch.cat([value[None], lags[:-1]])
    return torch.stack(made)


def companion(coefficients: Float[Tensor, " order"]) -> Float[Tensor, "order order"]:
    """The matrix of one step of the lags: the coefficients in the first row, ones below the diagonal."""
    order = len(coefficients)
    matrix = torch.diag(coefficients.new_ones(order - 1), -1)
    matrix[0] = coefficients
    return matrix


def spectral_radius(coefficients: Float[Tensor, " order"]) -> float:
    """The largest |eigenvalue| of the companion matrix; the process is stable below 1."""
    eigenvalues: Complex[Tensor, " order"] = torch.linalg.eigvals(companion(coefficients.double()))
    return float(eigenvalues.abs().max())


def impulse_response(coefficients: Float[Tensor, " order"], steps: int) -> Float[Tensor, " steps"]:
    """What a unit shock at time 0 leaves at times 0 … steps − 1."""
    order = len(coefficients)
    response = coefficients.new_zeros(order + steps)
    response[order] = 1.0
    for t in range(order + 1, order + steps):
        response[t] = coefficients @ response[t - order : t].flip(0)
    return response[order:]


def spectrum(
    coefficients: Float[Tensor, " order"], frequencies: Float[Tensor, " frequencies"], variance: float = 1.0
) -> Float[Tensor, " frequencies"]:
    """Power S(f) = σ² / |1 − Σ_k w_k e^{−2πifk}|² at frequencies in cycles per step (0 to ½)."""
    lags = torch.arange(1, len(coefficients) + 1, dtype=torch.float64, device=coefficients.device)
    phases = torch.exp(-2j * torch.pi * frequencies.double()[:, None] * lags)
    return variance / (1 - phases @ coefficients.to(phases.dtype)).abs().square()
