"""Autoregressive series and the measures of a forecast, against their formulas."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ostinato.errors import ConfigurationError, DataError, UnknownNameError
from ostinato.tasks.autoregression import (
    at_lags,
    mase,
    persistence,
    random_coefficients,
    real_series,
    rmse,
    simulate_ar,
    stpe,
)


def test_the_first_coefficient_belongs_to_the_latest_value() -> None:
    series = simulate_ar([0.0, 0.9], 4000, seed=3)
    one, two = (np.corrcoef(series[lag:], series[:-lag])[0, 1] for lag in (1, 2))
    assert abs(one) < 0.15 and two > 0.8


def test_what_is_left_is_the_noise_and_seeds_do_not_mix() -> None:
    weights = np.array([0.2, 0.3, -0.5])
    both = simulate_ar(weights, 500, [4, 5])
    np.testing.assert_allclose(both[1], simulate_ar(weights, 500, 5), atol=1e-12)
    noise = both[0, 3:] - 0.2 * both[0, 2:-1] - 0.3 * both[0, 1:-2] + 0.5 * both[0, :-3]
    drawn = np.random.default_rng(4).standard_normal(3 + 1000 + 500)[-497:]
    np.testing.assert_allclose(noise, drawn, atol=1e-12)


def test_coefficients() -> None:
    assert np.abs(random_coefficients(7, 0)).sum() == pytest.approx(0.9)
    np.testing.assert_array_equal(at_lags((0.5, -0.1), (1, 4), 5), [0.5, 0, 0, -0.1, 0])
    with pytest.raises(ConfigurationError, match="lags from 1 to 3"):
        at_lags((0.5,), (4,), 3)
    with pytest.raises(ConfigurationError, match="spectral radius"):
        simulate_ar([1.1], 10, 0)


def test_measures() -> None:
    assert stpe([1.0, 0.0], [0.0, 1.0]) == 100
    assert stpe([0.5], [0.5, 0.0]) == 0 == stpe([0.0], [0.0])
    assert stpe([0.5], [1.0]) == pytest.approx(100 * 0.5 / 1.5)
    assert rmse(np.array([1.0, 3.0]), np.array([1.0, 1.0])) == pytest.approx(2**0.5)
    assert mase(np.array([3.0]), np.array([1.0]), np.array([0.0, 4.0, 0.0])) == pytest.approx(0.5)
    with pytest.raises(DataError, match="no scale"):
        mase(np.array([3.0]), np.array([1.0]), np.array([0.0, 1.0, 0.0, 1.0]), season=2)
    np.testing.assert_array_equal(persistence(np.arange(5.0), 5, season=2), [3, 4, 3, 4, 3])
    with pytest.raises(DataError, match="season 6"):
        persistence(np.arange(5.0), 1, season=6)


def test_real_series(tmp_path: Path) -> None:
    for name, text in {
        "nile": "year,volume\n1871,1120\n1872,1160\n",
        "co2": "date,co2\n19580329,316\n19580405,317\n19580412,319\n19580503,\n19580607,322\n",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.csv").write_text(text)
    np.testing.assert_array_equal(real_series("nile", tmp_path), [1120, 1160])
    np.testing.assert_array_equal(real_series("co2", tmp_path), [316, 318, 320, 322])
    with pytest.raises(DataError, match="no file"):
        real_series("sunspots", tmp_path)
    with pytest.raises(UnknownNameError):
        real_series("sunspot")
