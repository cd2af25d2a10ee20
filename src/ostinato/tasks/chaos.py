"""Chaotic systems with known equations: Lorenz-63, Rössler, Lorenz-96, integrated by RK4.

    data = chaos_data("lorenz63", train=50_000, test=20_000, step=0.05)
    data.train, data.test        # standardised by the mean and deviation of the training part

One series is integrated; the training part comes first, and the test part continues it. Everything is NumPy in
float64, and exact in the sense that the same arguments give the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from ostinato.errors import UnknownNameError
from ostinato.tasks.base import require

Array = np.ndarray


@dataclass(frozen=True)
class ChaoticSystem:
    """dx/dt = flow(x), for x of shape (..., dimension), and the Jacobian of the flow."""

    name: str
    dimension: int
    flow: Callable[[Array], Array]
    jacobian: Callable[[Array], Array]
    start: tuple[float, ...]
    """Near the attractor; a transient is discarded all the same."""
    step: float
    """A usual integration step, in the system's own unit of time."""
    exponents: tuple[float, ...]
    """Lyapunov exponents per unit of time, from the literature; empty where none are quoted."""


def lorenz63(sigma: float = 10.0, rho: float = 28.0, beta: float = 8 / 3) -> ChaoticSystem:
    """x' = σ(y − x), y' = x(ρ − z) − y, z' = xy − βz (Lorenz 1963)."""

    def flow(state: Array) -> Array:
        x, y, z = state[..., 0], state[..., 1], state[..., 2]
        return np.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z], axis=-1)

    def jacobian(state: Array) -> Array:
        x, y, z = state[..., 0], state[..., 1], state[..., 2]
        one, zero = np.ones_like(x), np.zeros_like(x)
        rows = [[-sigma * one, sigma * one, zero], [rho - z, -one, -x], [y, x, -beta * one]]
        return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    known = (0.906, 0.0, -14.57) if (sigma, rho, beta) == (10.0, 28.0, 8 / 3) else ()
    return ChaoticSystem("lorenz63", 3, flow, jacobian, (1.0, 1.0, 25.0), 0.01, known)


def rossler(a: float = 0.2, b: float = 0.2, c: float = 5.7) -> ChaoticSystem:
    """x' = −y − z, y' = x + ay, z' = b + z(x − c) (Rössler 1976)."""

    def flow(state: Array) -> Array:
        x, y, z = state[..., 0], state[..., 1], state[..., 2]
        return np.stack([-y - z, x + a * y, b + z * (x - c)], axis=-1)

    def jacobian(state: Array) -> Array:
        x, z = state[..., 0], state[..., 2]
        one, zero = np.ones_like(x), np.zeros_like(x)
        rows = [[zero, -one, -one], [one, a * one, zero], [z, zero, x - c]]
        return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)

    known = (0.0714, 0.0, -5.394) if (a, b, c) == (0.2, 0.2, 5.7) else ()
    return ChaoticSystem("rossler", 3, flow, jacobian, (1.0, 1.0, 0.1), 0.08, known)


def lorenz96(dimension: int = 20, forcing: float = 8.0) -> ChaoticSystem:
    """x_i' = (x_{i+1} − x_{i−2}) x_{i−1} − x_i + F, indices around a ring (Lorenz 1996)."""
    require(dimension >= 4, f"Lorenz-96 needs at least 4 variables, got {dimension}")

    def flow(state: Array) -> Array:
        ahead, behind, before = np.roll(state, -1, -1), np.roll(state, 1, -1), np.roll(state, 2, -1)
        return (ahead - before) * behind - state + forcing

    def jacobian(state: Array) -> Array:
        ahead, behind, before = np.roll(state, -1, -1), np.roll(state, 1, -1), np.roll(state, 2, -1)
        out = np.zeros((*state.shape, dimension))
        i = np.arange(dimension)
        out[..., i, (i + 1) % dimension] += behind
        out[..., i, (i - 2) % dimension] -= behind
        out[..., i, (i - 1) % dimension] += ahead - before
        out[..., i, i] -= 1.0
        return out

    start = tuple(forcing + (0.01 if i == 0 else 0.0) for i in range(dimension))
    return ChaoticSystem("lorenz96", dimension, flow, jacobian, start, 0.04, ())


SYSTEMS: dict[str, Callable[[], ChaoticSystem]] = {"lorenz63": lorenz63, "rossler": rossler, "lorenz96": lorenz96}


def chaotic_system(name: str) -> ChaoticSystem:
    """The system of a name with its usual parameters; raises `UnknownNameError`."""
    if name not in SYSTEMS:
        raise UnknownNameError("chaotic system", name, SYSTEMS)
    return SYSTEMS[name]()


def runge_kutta(system: ChaoticSystem, state: Array, step: float) -> Array:
    """One step of the classical fourth-order method."""
    flow = system.flow
    k1 = flow(state)
    k2 = flow(state + 0.5 * step * k1)
    k3 = flow(state + 0.5 * step * k2)
    k4 = flow(state + step * k3)
    return state + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def runge_kutta_jacobian(system: ChaoticSystem, state: Array, step: float) -> Float[Array, "... dim dim"]:
    """The derivative of `runge_kutta` by the state: exact for the discrete map."""
    flow, slope, eye = system.flow, system.jacobian, np.eye(system.dimension)
    k1 = flow(state)
    k2 = flow(state + 0.5 * step * k1)
    k3 = flow(state + 0.5 * step * k2)
    d1 = slope(state)
    d2 = slope(state + 0.5 * step * k1) @ (eye + 0.5 * step * d1)
    d3 = slope(state + 0.5 * step * k2) @ (eye + 0.5 * step * d2)
    d4 = slope(state + step * k3) @ (eye + step * d3)
    return eye + step / 6 * (d1 + 2 * d2 + 2 * d3 + d4)


def trajectory(
    system: ChaoticSystem,
    length: int,
    step: float | None = None,
    *,
    start: Array | None = None,
    transient: float = 50.0,
) -> Float[Array, "length dim"]:
    """`length` points, `step` apart, after a transient of so many units of time.

    Raises:
        ConfigurationError: a length below 1 or a step that is not positive.
    """
    step = system.step if step is None else step
    require(length >= 1 and step > 0, f"a trajectory needs length ≥ 1 and step > 0, got {length} and {step}")
    state = np.array(system.start if start is None else start, dtype=np.float64)
    for _ in range(round(transient / step)):
        state = runge_kutta(system, state, step)
    out = np.empty((length, *state.shape))
    for t in range(length):
        out[t] = state
        state = runge_kutta(system, state, step)
    return out


@dataclass(frozen=True)
class ChaosData:
    """A standardised series in two parts."""

    system: ChaoticSystem
    step: float
    train: Float[Array, "time dim"]
    test: Float[Array, "time dim"]
    mean: Float[Array, " dim"]
    deviation: Float[Array, " dim"]

    @cached_property
    def exponents(self) -> Float[Array, " dim"]:
        """The Lyapunov spectrum of the integrated map per unit of time, measured along the test part by QR."""
        raw = self.test * self.deviation + self.mean
        jacobians = runge_kutta_jacobian(self.system, raw, self.step)
        frame, total = np.eye(self.system.dimension), np.zeros(self.system.dimension)
        for jacobian in jacobians:
            frame, stretch = np.linalg.qr(jacobian @ frame)
            total += np.log(np.abs(np.diag(stretch)))
        return total / (len(raw) * self.step)


def chaos_data(
    name: str, *, train: int, test: int, step: float | None = None, noise: float = 0.0, seed: int = 0
) -> ChaosData:
    """A system's series, standardised; `noise` (of the standardised series, per point) is added to train only.

    Raises:
        UnknownNameError: no such system.
        ConfigurationError: lengths or step out of range.
    """
    system = chaotic_system(name)
    step = system.step if step is None else step
    require(train >= 2 and test >= 1, f"need at least 2 training points and 1 test point, got {train} and {test}")
    series = trajectory(system, train + test, step)
    mean, deviation = series[:train].mean(0), series[:train].std(0)
    series = (series - mean) / deviation
    heard = series[:train]
    if noise:
        heard = heard + noise * np.random.default_rng([seed, 63]).standard_normal(heard.shape)
    return ChaosData(system, step, heard, series[train:], mean, deviation)
