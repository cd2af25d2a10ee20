"""Autoregressive series with known coefficients, a few real ones, and the measures of a forecast.

    series = simulate_ar([0.2, 0.3, -0.5], length=25_000, seed=0)
    stpe(fitted, [0.2, 0.3, -0.5])       # 0 (equal) … 100 (nothing in common)

Coefficients are written as in y_t = Σ_i w_i y_{t−i} + ε_t: w[0] belongs to the latest value. Everything is NumPy in
float64 (arXiv 1911.12436, sections 3 and 4).
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from ostinato.errors import DataError, UnknownNameError
from ostinato.tasks.base import require

Array = np.ndarray

SPARSE_COEFFICIENTS = (0.2, 0.3, -0.5)
"""The paper's AR(3)."""
REAL_SERIES = ("sunspots", "co2", "nile")
"""Series that `real_series` reads."""


def random_coefficients(order: int, seed: int, *, total: float = 0.9) -> Float[Array, " order"]:
    """Coefficients drawn uniformly from [−1, 1] and scaled to Σ|w_i| = `total`: a stable process if `total` < 1."""
    require(order >= 1 and 0 < total <= 1, f"need order ≥ 1 and 0 < total ≤ 1, got {order} and {total}")
    weights = np.random.default_rng([order, seed]).uniform(-1, 1, order)
    return weights * (total / np.abs(weights).sum())


def at_lags(values: Sequence[float], lags: Sequence[int], order: int) -> Float[Array, " order"]:
    """Coefficients that are zero but for `values` at `lags` (1 is the latest)."""
    require(
        len(values) == len(lags) and min(lags) >= 1 and max(lags) <= order,
        f"need one value for each lag, and lags from 1 to {order}; got values {values} at lags {lags}",
    )
    weights = np.zeros(order)
    weights[np.asarray(lags) - 1] = values
    return weights


def simulate_ar(
    coefficients: Sequence[float] | Array, length: int, seed: int | Sequence[int], *, burn_in: int = 1000
) -> Float[Array, "*members length"]:
    """y_t = Σ_i w_i y_{t−i} + ε_t with ε ~ N(0, 1); `burn_in` steps from zero are discarded.

    A sequence of seeds gives one series for each, row by row; the series of a seed is the same
    alone or among others, up to rounding.

    Raises:
        ConfigurationError: no length, or coefficients whose process grows without bound (spectral radius ≥ 1).
    """
    weights = np.trim_zeros(np.asarray(coefficients, dtype=float), "b")
    require(length >= 1 and burn_in >= 0, f"need length ≥ 1 and burn_in ≥ 0, got {length} and {burn_in}")
    radius = float(np.abs(np.roots(np.concatenate([[1.0], -weights]))).max(initial=0.0))
    require(radius < 1, f"coefficients with spectral radius {radius:.4f} ≥ 1 have no stationary process; scale them")
    seeds = [seed] if isinstance(seed, int) else list(seed)
    order = len(weights)
    series = np.stack([np.random.default_rng(each).standard_normal(order + burn_in + length) for each in seeds])
    oldest_first = weights[::-1].copy()
    if order:
        for t in range(order, series.shape[1]):
            series[:, t] += series[:, t - order : t] @ oldest_first
    kept = series[:, order + burn_in :]
    return kept[0] if isinstance(seed, int) else kept


def stpe(fitted: Sequence[float] | Array, true: Sequence[float] | Array) -> float:
    """Symmetric total percentage error, 100 · Σ|ŵ_i − w_i| / Σ(|ŵ_i| + |w_i|); the shorter is filled up with zeros.

    0 if all are equal (also if all are zero), 100 if no lag is shared (arXiv 1911.12436, section 4).
    """
    found, wanted = np.asarray(fitted, dtype=float), np.asarray(true, dtype=float)
    size = max(len(found), len(wanted))
    found, wanted = np.pad(found, (0, size - len(found))), np.pad(wanted, (0, size - len(wanted)))
    total = np.abs(found).sum() + np.abs(wanted).sum()
    return float(100 * np.abs(found - wanted).sum() / total) if total else 0.0


def rmse(forecast: Array, target: Array) -> float:
    """√(mean (forecast − target)²)."""
    return float(np.sqrt(np.mean((np.asarray(forecast, dtype=float) - np.asarray(target, dtype=float)) ** 2)))


def mase(forecast: Array, target: Array, history: Array, season: int = 1) -> float:
    """Mean absolute error, in units of the seasonal persistence's inside `history`: below 1 beats it.

    mean|ŷ − y| / mean_t|h_t − h_{t−season}|. Raises `DataError` for a history that is too short or repeats exactly.
    """
    history = np.asarray(history, dtype=float)
    if len(history) <= season:
        raise DataError(f"a history of {len(history)} is too short for season {season}; pass at least {season + 1}")
    scale = float(np.abs(history[season:] - history[:-season]).mean())
    if scale == 0:
        raise DataError(f"the history repeats every {season} steps exactly: there is no scale to divide by")
    return float(np.abs(np.asarray(forecast, dtype=float) - np.asarray(target, dtype=float)).mean()) / scale


def persistence(history: Array, steps: int, season: int = 1) -> Float[Array, " steps"]:
    """The last `season` values, repeated: the forecast to beat. Raises `DataError` for a history shorter than that."""
    if not 1 <= season <= len(history):
        raise DataError(f"season {season} does not fit a history of {len(history)} values")
    return np.resize(np.asarray(history, dtype=float)[-season:], steps)


def real_series(name: str, folder: str | Path | None = None) -> Float[Array, " length"]:
    """A measured series, from the files of the `statsmodels` package (which is not imported).

    - `sunspots`: yearly numbers, 1700 to 2008;
    - `co2`: the weekly concentrations at Mauna Loa, 1958 to 2001, as monthly means; months without a value are
      interpolated;
    - `nile`: the yearly flow at Aswan, 1871 to 1970.

    Args:
        name: one of `REAL_SERIES`.
        folder: where the files `name/name.csv` stand; None takes those of the installed package.

    Raises:
        UnknownNameError: another name.
        DataError: the package is not installed, or the file is not there.
    """
    if name not in REAL_SERIES:
        raise UnknownNameError("real series", name, REAL_SERIES)
    if folder is None:
        found = importlib.util.find_spec("statsmodels")
        if found is None or found.origin is None:
            raise DataError(f"the series {name!r} is in the package statsmodels: pip install statsmodels")
        folder = Path(found.origin).parent / "datasets"
    path = Path(folder) / name / f"{name}.csv"
    if not path.is_file():
        raise DataError(f"there is no file {path}; is the package statsmodels complete?")
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return _monthly(rows) if name == "co2" else np.array([float(row[1]) for row in rows])


def _monthly(rows: list[list[str]]) -> Array:
    """Means by calendar month of rows (yyyymmdd, value or nothing); empty months by linear interpolation."""
    months: dict[int, list[float]] = {}
    for date, value in rows:
        months.setdefault(int(date[:4]) * 12 + int(date[4:6]) - 1, []).extend([float(value)] if value else [])
    known = {month: float(np.mean(values)) for month, values in months.items() if values}
    whole = np.arange(min(known), max(known) + 1)
    return np.interp(whole, list(known), list(known.values()))
