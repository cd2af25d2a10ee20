"""Chaotic systems: the equations, RK4's order, its derivative, and exponents against the literature."""

from __future__ import annotations

import numpy as np
import pytest

from ostinato.errors import ConfigurationError, UnknownNameError
from ostinato.tasks.chaos import (
    SYSTEMS,
    chaos_data,
    chaotic_system,
    lorenz63,
    lorenz96,
    runge_kutta,
    runge_kutta_jacobian,
    trajectory,
)


def test_equations_at_a_point() -> None:
    state = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(lorenz63().flow(state), [10.0, 28 - 3 - 2, 2 - 8.0])
    np.testing.assert_allclose(chaotic_system("rossler").flow(state), [-5.0, 1.4, 0.2 + 3 * (1 - 5.7)])
    x = np.arange(1.0, 6.0)
    expected = [(x[(i + 1) % 5] - x[i - 2]) * x[i - 1] - x[i] + 8 for i in range(5)]
    np.testing.assert_allclose(lorenz96(5).flow(x), expected)


@pytest.mark.parametrize("name", SYSTEMS)
def test_jacobians_are_derivatives(name: str) -> None:
    system = chaotic_system(name)
    state = np.random.default_rng(0).standard_normal(system.dimension) * 2
    for function, jacobian in (
        (system.flow, system.jacobian(state)),
        (lambda x: runge_kutta(system, x, 0.05), runge_kutta_jacobian(system, state, 0.05)),
    ):
        for i in range(system.dimension):
            move = np.zeros(system.dimension)
            move[i] = 1e-6
            slope = (function(state + move) - function(state - move)) / 2e-6
            np.testing.assert_allclose(jacobian[:, i], slope, atol=2e-6)


def test_the_order_is_four() -> None:
    system, state = lorenz63(), np.array([1.0, 2.0, 20.0])
    exact = trajectory(system, 1025, 0.2 / 1024, start=state, transient=0)[-1]
    coarse = trajectory(system, 9, 0.2 / 8, start=state, transient=0)[-1]
    fine = trajectory(system, 17, 0.2 / 16, start=state, transient=0)[-1]
    assert 11 < np.linalg.norm(coarse - exact) / np.linalg.norm(fine - exact) < 22


def test_many_states_at_once_are_each_alone() -> None:
    states = np.random.default_rng(1).standard_normal((4, 3))
    together = trajectory(lorenz63(), 20, 0.01, start=states, transient=0)
    assert together.shape == (20, 4, 3)
    np.testing.assert_array_equal(together[:, 2], trajectory(lorenz63(), 20, 0.01, start=states[2], transient=0))


def test_exponents_of_lorenz() -> None:
    data = chaos_data("lorenz63", train=2, test=6000, step=0.05)
    np.testing.assert_allclose(data.exponents, [0.905, 0.0, -14.5], atol=0.06)


def test_standardised_and_noisy() -> None:
    clean = chaos_data("rossler", train=2000, test=100)
    noisy = chaos_data("rossler", train=2000, test=100, noise=0.1, seed=3)
    np.testing.assert_allclose(clean.train.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(clean.train.std(0), 1)
    np.testing.assert_array_equal(clean.test, noisy.test)
    assert 0.09 < (noisy.train - clean.train).std() < 0.11
    # the test part goes on where training ended
    raw = clean.train[-1] * clean.deviation + clean.mean
    after = (runge_kutta(clean.system, raw, clean.step) - clean.mean) / clean.deviation
    np.testing.assert_allclose(clean.test[0], after, atol=1e-9)


def test_refusals() -> None:
    with pytest.raises(UnknownNameError, match="lorenz63"):
        chaotic_system("lorenz64")
    with pytest.raises(ConfigurationError, match="at least 4"):
        lorenz96(3)
    with pytest.raises(ConfigurationError, match="length"):
        trajectory(lorenz63(), 0)
