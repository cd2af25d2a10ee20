from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ostinato.errors import ConfigurationError, ShapeError
from ostinato.theory.householder import (
    contraction_factors,
    orthogonal_factors,
    padded,
    permutation_factors,
    product,
    rotation_factors,
)


def _orthogonal(n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0] * torch.randn(n).sign()).to(dtype)


def _keys(*shape: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_product_applies_the_first_factor_first() -> None:
    keys, betas = _keys(3, 4), torch.rand(3).double()
    a, b, c = (torch.eye(4).double() - beta * torch.outer(key, key) for key, beta in zip(keys, betas, strict=True))
    torch.testing.assert_close(product(keys, betas), c @ b @ a)
    torch.testing.assert_close(product(keys[:1]), torch.eye(4).double() - 2 * torch.outer(keys[0], keys[0]))


def test_product_of_none_is_the_identity() -> None:
    assert torch.equal(product(torch.zeros(0, 3)), torch.eye(3))


def test_product_wants_a_beta_for_each_key() -> None:
    with pytest.raises(ShapeError, match="betas"):
        product(torch.zeros(2, 3), torch.zeros(3))


@pytest.mark.parametrize("n", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_orthogonal_matrix_is_at_most_n_reflections(n: int, dtype: torch.dtype, close: float) -> None:
    for _ in range(10):
        matrix = _orthogonal(n, dtype)
        keys, betas = orthogonal_factors(matrix)
        assert len(keys) <= n and bool((betas == 2).all())
        assert float((product(keys, betas) - matrix).abs().max()) < close


def test_reflections_of_the_identity_and_its_negative() -> None:
    assert len(orthogonal_factors(torch.eye(4))[0]) == 0
    assert len(orthogonal_factors(-torch.eye(4))[0]) == 4  # and no fewer would do


def test_rotation_by_a_tiny_angle_keeps_its_digits() -> None:
    angle = torch.tensor(1e-7, dtype=torch.float64)
    matrix = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    assert float((product(*orthogonal_factors(matrix)) - matrix)[1, 0].abs()) < 1e-15


def test_contraction_is_at_most_3n_factors_with_beta_up_to_two() -> None:
    for n in (1, 3, 6):
        matrix = torch.randn(n, n, dtype=torch.float64)
        matrix /= torch.linalg.matrix_norm(matrix, 2)
        keys, betas = contraction_factors(matrix)
        assert len(keys) <= 3 * n and float(betas.min()) >= 0 and float(betas.max()) <= 2
        torch.testing.assert_close(keys.norm(dim=1), torch.ones(len(keys)).double())
        torch.testing.assert_close(product(keys, betas), matrix, atol=1e-12, rtol=0)


@given(st.integers(1, 7).flatmap(lambda n: st.permutations(range(n))))
def test_permutation_is_n_minus_cycles_reflections(permutation: list[int]) -> None:
    n = len(permutation)
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix[permutation, range(n)] = 1
    keys, betas = permutation_factors(permutation)
    torch.testing.assert_close(product(keys, betas), matrix, atol=1e-14, rtol=0)
    assert len(keys) == torch.linalg.matrix_rank(matrix - torch.eye(n).double())


def test_the_longest_permutation_of_five_needs_four() -> None:
    keys, betas = padded([permutation_factors(p) for p in permutations(range(5))])
    assert keys.shape == (120, 4, 5) and betas.shape == (120, 4)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(120, 4).double())


def test_rotation_is_two_reflections() -> None:
    identity = torch.eye(3, dtype=torch.float64)
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))
    random = [m * torch.linalg.det(m) for m in (_orthogonal(3) for _ in range(20))]
    for rotation in (identity, half_turn, *random):
        keys, betas = rotation_factors(rotation)
        assert keys.shape == (2, 3)
        torch.testing.assert_close(keys.norm(dim=1), torch.ones(2).double())
        torch.testing.assert_close(product(keys, betas), rotation, atol=1e-13, rtol=0)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not orthogonal"):
        orthogonal_factors(2 * torch.eye(3))
    with pytest.raises(ShapeError, match="square"):
        orthogonal_factors(torch.zeros(2, 3))
    with pytest.raises(ConfigurationError, match="spectral norm is 2"):
        contraction_factors(2 * torch.eye(3))
    with pytest.raises(ConfigurationError, match="not a permutation"):
        permutation_factors((0, 2))
    with pytest.raises(ConfigurationError, match="not a rotation"):
        rotation_factors(-torch.eye(3))
    with pytest.raises(ShapeError, match="3×3"):
        rotation_factors(torch.eye(2))
    with pytest.raises(ConfigurationError, match="more than 1"):
        padded([permutation_factors((1, 2, 0))], 1)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_norm_is_at_most_one_for_beta_up_to_two(n: int) -> None:
    matrices = product(_keys(200, n, 4), 2 * torch.rand(200, n).double())
    assert float(torch.linalg.matrix_norm(matrices, 2).max()) <= 1 + 1e-12


def test_one_factor_is_symmetric_with_one_eigenvalue() -> None:
    betas = 2 * torch.rand(50, 1).double()
    matrices = product(_keys(50, 1, 3), betas)
    torch.testing.assert_close(matrices, matrices.mT)
    wanted = torch.cat([1 - betas, torch.ones(50, 2).double()], 1).sort(1).values
    torch.testing.assert_close(torch.linalg.eigvalsh(matrices), wanted)


def test_two_reflections_turn_by_twice_the_angle_of_their_keys() -> None:
    angle = torch.tensor(0.3, dtype=torch.float64)
    keys = torch.stack([torch.tensor([1.0, 0.0]).double(), torch.stack([angle.cos(), angle.sin()])])
    turn = torch.stack(
        [torch.stack([(2 * angle).cos(), -(2 * angle).sin()]), torch.stack([(2 * angle).sin(), (2 * angle).cos()])]
    )
    torch.testing.assert_close(product(keys), turn)


def test_two_factors_with_beta_up_to_one_have_real_eigenvalues_and_three_have_not() -> None:
    two = torch.linalg.eigvals(product(_keys(500, 2, 4), torch.rand(500, 2).double()))
    assert float(two.imag.abs().max()) < 1e-6
    assert float(two.real.min()) > -1e-6 and float(two.real.max()) < 1 + 1e-6
    three = torch.linalg.eigvals(product(_keys(2000, 3, 2), torch.rand(2000, 3).double()))
    assert float(three.imag.abs().max()) > 1e-2
