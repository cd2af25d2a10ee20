"""HiPPO matrices: two definitions of each, what they remember, and their diagonal forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.hippo import (
    DIAGONALS,
    diagonal_plus_low_rank,
    diagonal_system,
    discretize,
    discretize_diagonal,
    hippo_matrix,
    low_rank_part,
)


def quasiseparable(measure: str, size: int) -> Tensor:
    """−P (diag(c) + T^{-1}) P with tridiagonal T: LSSL's structured form of the same matrices (section 5.2)."""
    n = torch.arange(size, dtype=torch.float64)
    p, c = torch.sqrt(2 * n + 1), torch.zeros(size, dtype=torch.float64)
    lower, main, upper = -1.0, torch.ones(size, dtype=torch.float64), 0.0
    if measure == "legs":
        c = -n / (2 * n + 1)
    elif measure == "lagt":
        p, c = torch.ones_like(n), torch.full_like(n, -0.5)
    else:
        lower, main, upper = -0.5, torch.zeros_like(main), 0.5
        main[0] = main[-1] = 0.5
    ones = torch.ones(size - 1, dtype=torch.float64)
    t = torch.diag(main) + torch.diag(lower * ones, -1) + torch.diag(upper * ones, 1)
    return -p.unsqueeze(1) * (torch.diag(c) + torch.linalg.inv(t)) * p


@pytest.mark.parametrize(("measure", "factor"), [("legs", 1), ("lagt", 1), ("legt", 2)])
def test_the_matrices_equal_their_quasiseparable_form(measure: str, factor: float) -> None:
    matrix, _ = hippo_matrix(measure, 12)
    torch.testing.assert_close(quasiseparable(measure, 12), factor * matrix, rtol=1e-12, atol=1e-11)


def test_the_eigenvalues_of_legs_are_the_negative_integers() -> None:
    matrix, _ = hippo_matrix("legs", 16)
    values = torch.linalg.eigvals(matrix)
    torch.testing.assert_close(values.real.sort().values, -torch.arange(16.0, 0, -1, dtype=torch.float64))
    assert values.imag.abs().max() < 1e-6


@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_plus_low_rank_is_normal(measure: str) -> None:
    matrix, _ = hippo_matrix(measure, 16)
    low_rank = low_rank_part(measure, 16)
    normal = matrix + low_rank.T @ low_rank
    shift = -1.0 if measure == "legs" else 0.0
    torch.testing.assert_close(normal + normal.T, shift * torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-12)
    zeros = int((torch.linalg.eigvals(normal).abs() < 1e-9).sum())
    assert zeros == (2 if measure == "fout" else 0)


@pytest.mark.parametrize("size", [2, 16, 64])
@pytest.mark.parametrize("measure", ["legs", "legt", "fout"])
def test_the_low_rank_form_is_the_matrix(measure: str, size: int) -> None:
    matrix, inputs = hippo_matrix(measure, size)
    form = diagonal_plus_low_rank(measure, size)
    basis = torch.cat([form.basis, form.basis.conj()], dim=1)
    values = torch.cat([form.eigenvalues, form.eigenvalues.conj()])
    low = torch.cat([form.low_rank, form.low_rank.conj()], dim=1)
    identity = torch.eye(size, dtype=basis.dtype)
    torch.testing.assert_close(basis @ basis.mH, identity, rtol=0, atol=1e-12)
    rebuilt = basis @ (torch.diag(values) - low.T @ low.conj()) @ basis.mH
    torch.testing.assert_close(rebuilt, matrix.to(basis.dtype), rtol=0, atol=1e-12 * matrix.abs().max().item())
    back = basis @ torch.cat([form.inputs, form.inputs.conj()])
    torch.testing.assert_close(back, inputs.to(basis.dtype), rtol=0, atol=1e-12)
    assert (form.eigenvalues.imag <= 0).all()


@pytest.mark.parametrize("name", DIAGONALS)
def test_diagonal_systems_are_stable(name: str) -> None:
    values, inputs = diagonal_system(name, 64)
    assert values.shape == inputs.shape == (32,)
    assert (values.real <= -0.5 + 1e-9).all()
    expected = {"lin": 3 * math.pi, "inv": 64 / math.pi * (64 / 7 - 1), "quad": 49 / math.pi, "real": 0.0}
    if name in expected:
        assert values[3].imag.item() == pytest.approx(expected[name])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, None])
def test_discretisation_solves_the_equation(alpha: float | None) -> None:
    """x' = A x + B with constant input: many small steps end where e^{A} says, to the order of the rule."""
    matrix, inputs = hippo_matrix("legs", 4)
    exact_matrix, exact_inputs = discretize(matrix, inputs, 1.0, alpha=None)
    errors = []
    for steps in (200, 400):
        a, b = discretize(matrix, inputs, 1 / steps, alpha=alpha)
        x = torch.ones(4, dtype=torch.float64)
        for _ in range(steps):
            x = a @ x + b
        errors.append((x - (exact_matrix.sum(1) + exact_inputs)).abs().max().item())
    if alpha is None:
        assert max(errors) < 1e-10
    else:
        order = math.log2(errors[0] / errors[1])
        assert order == pytest.approx(2 if alpha == 0.5 else 1, abs=0.1)


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_diagonal_discretisation_is_the_dense_one(method: str) -> None:
    values = torch.tensor([-0.5, -2.0, -1e-8], dtype=torch.float64)
    a, b = discretize_diagonal(values.to(torch.complex128), torch.tensor(0.1, dtype=torch.float64), method)
    alpha = None if method == "zoh" else 0.5
    dense_a, dense_b = discretize(torch.diag(values), torch.ones(3, dtype=torch.float64), 0.1, alpha=alpha)
    torch.testing.assert_close(a.real, dense_a.diagonal(), rtol=1e-12, atol=0)
    torch.testing.assert_close(b.real, dense_b, rtol=1e-12, atol=0)
    assert a.imag.abs().max() == 0


def test_a_sigmoid_gate_is_a_backward_euler_step() -> None:
    """x' = −x + u with Δ = e^z is x_t = (1 − σ(z)) x_{t−1} + σ(z) u_t: lemma 3.1 of LSSL."""
    one = torch.ones(1, 1, dtype=torch.float64)
    for z in (-3.0, 0.0, 2.5):
        a, b = discretize(-one, one[0], math.exp(z), alpha=1.0)
        gate = 1 / (1 + math.exp(-z))
        assert a.item() == pytest.approx(1 - gate, abs=1e-15)
        assert b.item() == pytest.approx(gate, abs=1e-15)


def recall(matrix: Tensor, inputs: Tensor, step: float, delay: int) -> float:
    """R² of the best linear read-out of the input `delay` steps ago from the state (ridge, held-out data)."""
    generator = torch.Generator().manual_seed(0)
    time, start, cut = 6000, 600, 4000
    noise = torch.fft.rfft(torch.randn(time, generator=generator, dtype=torch.float64))
    noise[int(0.05 * time) :] = 0
    signal = torch.fft.irfft(noise, n=time)
    signal = signal / signal.std()
    a, b = discretize(matrix, inputs, step)
    states, x = [], torch.zeros(matrix.shape[0], dtype=torch.float64)
    for u in signal:
        x = a @ x + b * u
        states.append(x)
    h, target = torch.stack(states)[start:], signal[start - delay : time - delay]
    h = h / h[: cut - start].std(0)
    fit, test = slice(0, cut - start), slice(cut - start, None)
    gram = h[fit].T @ h[fit] + 1e-6 * (cut - start) * torch.eye(h.shape[1], dtype=torch.float64)
    guess = h[test] @ torch.linalg.solve(gram, h[fit].T @ target[fit])
    return 1 - ((guess - target[test]).square().mean() / target[test].var()).item()


def test_hippo_remembers_and_a_real_diagonal_does_not() -> None:
    size = 64
    assert recall(*hippo_matrix("legs", size), 1 / 128, 128) > 0.99
    assert recall(*hippo_matrix("legt", size), 1 / 256, 256) > 0.99
    diagonal = -torch.diag(torch.arange(1.0, size + 1, dtype=torch.float64))
    ones = torch.ones(size, dtype=torch.float64)
    assert max(recall(diagonal, ones, 1 / 64, 128), recall(diagonal, ones, 1 / 256, 128)) < 0.5


def test_bad_names_and_sizes_are_named() -> None:
    with pytest.raises(ConfigurationError, match="no measure 'leggs'"):
        hippo_matrix("leggs", 8)
    with pytest.raises(ConfigurationError, match="even and positive, got 7"):
        hippo_matrix("legs", 7)
    with pytest.raises(ConfigurationError, match="no low-rank form"):
        diagonal_plus_low_rank("lagt", 8)
    with pytest.raises(ConfigurationError, match="no diagonal initialisation"):
        diagonal_system("linear", 8)
    with pytest.raises(ConfigurationError, match="no discretisation 'euler'"):
        discretize_diagonal(torch.ones(1, dtype=torch.complex64), torch.ones(1), "euler")
