"""Measures of reconstruction against hand computation, known systems and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ostinato.analysis.dynamics import (
    binned_divergence,
    lyapunov_spectrum,
    mixture_divergence,
    mixture_state_space_divergence,
    prediction_error,
    smoothed_spectrum,
    spectral_distance,
    spectral_hellinger,
    state_space_divergence,
)
from ostinato.errors import ShapeError
from ostinato.models.dynamics import DynamicsModel, free_run, generate
from ostinato.ops.cells.piecewise_linear import ALRNN, ShallowPLRNN

RNG = np.random.default_rng(0)


def test_binned_divergence_by_hand() -> None:
    true = np.array([[0.0], [0.0], [0.0], [1.0]])
    generated = np.array([[0.0], [1.0], [1.0], [7.0]])  # the 7 is outside and dropped
    p, q = np.array([3.0, 1.0]) + 1e-5, np.array([1.0, 2.0]) + 1e-5
    p, q = p / p.sum(), q / q.sum()
    assert binned_divergence(true, generated, bins=2) == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-12)
    assert binned_divergence(true, true, bins=2) == 0
    assert math.isnan(binned_divergence(true, generated + 100))
    assert math.isnan(binned_divergence(true, np.array([[0.0], [np.nan]])))


def test_mixture_divergence_of_two_gaussians() -> None:
    """One component each: KL of two Gaussians of one width is |μ − ν|²/(2σ²)."""
    true, generated = np.zeros((5, 6)), np.full((5, 6), 0.5)
    found = mixture_divergence(true, generated, variance=0.5, samples=20_000)
    assert found == pytest.approx(6 * 0.25 / (2 * 0.5), abs=0.06)
    assert mixture_divergence(true, true) == pytest.approx(0, abs=1e-12)
    assert math.isnan(mixture_divergence(true, generated * np.nan))


def test_smoothing_is_scipys() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    series = RNG.standard_normal((500, 2)).cumsum(0)
    scaled = (series - series.mean(0)) / series.std(0)
    power = np.abs(np.fft.rfft(scaled, axis=0)) ** 2
    wanted = ndimage.gaussian_filter1d(power, 7.0, axis=0, mode="reflect", truncate=4.0)
    np.testing.assert_allclose(smoothed_spectrum(series, 7.0), wanted / wanted.sum(0), rtol=1e-10)


def test_hellinger() -> None:
    t = np.arange(4000)
    slow, fast = np.sin(0.1 * t)[:, None], np.sin(1.5 * t)[:, None]
    assert spectral_hellinger(slow, slow) == pytest.approx(0, abs=1e-7)
    assert spectral_hellinger(slow, 3 * slow + 1) == pytest.approx(0, abs=1e-6)
    assert spectral_hellinger(slow, fast) > 0.99
    assert spectral_hellinger(slow, np.zeros_like(slow)) == 1
    assert math.isnan(spectral_hellinger(slow, slow + np.nan))
    p, q = smoothed_spectrum(slow, 2.0), smoothed_spectrum(fast, 2.0)
    assert spectral_hellinger(slow, fast, smoothing=2.0) == pytest.approx(math.sqrt(1 - np.sqrt(p * q).sum()))


def test_measures_say_how_they_were_taken() -> None:
    true = RNG.standard_normal((400, 2))
    measure = state_space_divergence(true, true + 0.1, bins=10)
    assert measure.floor == binned_divergence(true[:200], true[200:], bins=10)
    assert str(measure).startswith("D_stsp ")
    for part in ("T 400", "bins 10", "noise floor"):
        assert part in str(measure)
    assert "smoothing 5" in str(spectral_distance(true, true, smoothing=5.0))
    assert "variance 1.0" in str(mixture_state_space_divergence(true, true))
    with pytest.raises(ShapeError, match=r"\(time, dim\)"):
        state_space_divergence(true, true[:, :1])


def linear_model(matrix: torch.Tensor) -> DynamicsModel:
    """z' = matrix z: an AL-RNN without switching units."""
    model = DynamicsModel(ALRNN(0), len(matrix), len(matrix)).double()
    with torch.no_grad():
        model.diagonal.zero_()
        model.matrix.copy_(matrix[None])
    return model


def test_lyapunov_spectrum_of_a_linear_map() -> None:
    matrix = torch.tensor([[0.9, 0.3, 0.0], [0.0, 0.7, 0.2], [0.0, 0.0, 0.5]], dtype=torch.float64)
    model = linear_model(matrix)
    orbit = generate(model, torch.ones(1, 1, 3, dtype=torch.float64), 700)[:, :, 0]
    found = lyapunov_spectrum(model, orbit, step=0.1)
    np.testing.assert_allclose(found[0], np.log([0.9, 0.7, 0.5]) / 0.1, atol=1e-6)
    np.testing.assert_allclose(lyapunov_spectrum(model, orbit, step=0.1, count=1)[0], found[0, :1], atol=1e-9)


def test_the_tent_map_is_chaotic_with_log_of_its_slope() -> None:
    model = DynamicsModel(ALRNN(1), 1, 1, seeds=(0, 1)).double()
    with torch.no_grad():
        model.diagonal.fill_(1.5)
        model.matrix.fill_(-3.0)
        model.bias.fill_(1.0)
        model.bias[1] = 1e9  # diverges
    orbit = generate(model, torch.full((2, 1, 1), 0.3, dtype=torch.float64), 300, limit=1e3)[:, :, 0]
    found = lyapunov_spectrum(model, orbit)
    assert found[0, 0] == pytest.approx(math.log(1.5), abs=1e-9)
    assert math.isnan(found[1, 0]) and orbit[1].isnan().all()


def test_a_diverged_orbit_stays_nan_from_there() -> None:
    model = linear_model(torch.tensor([[2.0]], dtype=torch.float64))
    orbit = generate(model, torch.ones(1, 1, 1, dtype=torch.float64), 10, limit=100.0)
    assert orbit[0, :6, 0, 0].tolist() == [2, 4, 8, 16, 32, 64]
    assert orbit[0, 6:].isnan().all()


def test_free_run_drops_a_quarter_and_starts_at_the_first_point() -> None:
    model = DynamicsModel(ShallowPLRNN(5), 3, 3, seeds=(0, 1))
    data = torch.randn(40, 3)
    orbit = generate(model, data[:1].expand(2, 1, 3), 50)
    torch.testing.assert_close(free_run(model, data), orbit[:, 10:, 0])


def test_prediction_error_of_the_true_map_is_zero() -> None:
    angle = 0.2
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64)
    model = linear_model(turn)
    series = generate(model, torch.ones(1, 1, 2, dtype=torch.float64), 200)[0, :, 0]
    errors, persistence = prediction_error(model, series, 5)
    assert errors[0] < 1e-20
    # |x(t + 5) − x(t)|² = 4 |x|² sin²(5·0.2/2), over two dimensions
    assert persistence == pytest.approx(2 * 4 * math.sin(0.5) ** 2 / 2, rel=1e-6)
