"""Products of generalized Householder matrices I − β k kᵀ: which matrices they are, and how many factors it takes.

The transition of a delta-rule layer with n writes a step is such a product, applied in the order of its keys:

    A = (I − β_n k_n k_nᵀ) … (I − β_1 k_1 k_1ᵀ),   |k_j| = 1.

Every function that factors a matrix returns (keys, betas) in that order: `product(keys, betas)` gives it back.

Sources: DeltaProduct (arXiv 2502.10297), section 4; negative eigenvalues (arXiv 2411.12537), section 4; Householder
1958; the Cartan–Dieudonné theorem.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError, ShapeError

Factors = tuple[Tensor, Tensor]
"""Keys (factors, n) of length 1, and betas (factors,)."""


def product(
    keys: Float[Tensor, "... factors n"], betas: Float[Tensor, "... factors"] | None = None
) -> Float[Tensor, "... n n"]:
    """A = ∏ (I − β_j k_j k_jᵀ), the first factor applied first; β = 2 if None (reflections).

    In the type of `keys`. Keys are taken as they are: of length 1 each for what this file states.
    Raises `ShapeError` if the betas do not go with the keys.
    """
    if betas is None:
        betas = keys.new_full(keys.shape[:-1], 2.0)
    if betas.shape != keys.shape[:-1]:
        raise ShapeError(f"betas must be {tuple(keys.shape[:-1])}, one for each key, got {tuple(betas.shape)}")
    n = keys.shape[-1]
    matrix = torch.eye(n, dtype=keys.dtype, device=keys.device).expand(*keys.shape[:-2], n, n)
    for j in range(keys.shape[-2]):
        key = keys[..., j, :].unsqueeze(-1)
        matrix = matrix - betas[..., j, None, None] * key @ (key.mT @ matrix)
    return matrix


def orthogonal_factors(matrix: Float[Tensor, "n n"]) -> Factors:
    """An orthogonal n×n matrix as at most n reflections (β = 2): Householder's QR, whose R is the identity.

    Each reflection carries a column to +e_i, so it is left out where the column is there already. Computed in the
    type of `matrix`. Raises `ShapeError` for a matrix that is not square, `ConfigurationError` for one that is not
    orthogonal to 10³ roundings.
    """
    n = _square(matrix)
    rounding = torch.finfo(matrix.dtype).eps
    identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    if float((matrix.mT @ matrix - identity).abs().max()) > 1e3 * rounding:
        raise ConfigurationError("the matrix is not orthogonal: MᵀM differs from the identity")
    rest, keys = matrix.clone(), []
    for i in range(n):
        column = rest[:, i].clone()
        column[:i] = 0
        key = column.clone()
        below = column[i + 1 :].square().sum()
        # x_i − 1 from the other entries where the subtraction would cancel.
        key[i] = -below / (1 + column[i]) if column[i] > 0 else column[i] - 1
        length = key.norm()
        if length <= 4 * rounding:
            continue
        key = key / length
        rest = rest - 2 * torch.outer(key, key @ rest)
        keys.append(key)
    # H_r … H_1 M = I, so M = H_1 … H_r: the last found is applied first.
    stacked = torch.stack(keys[::-1]) if keys else matrix.new_zeros(0, n)
    return stacked, stacked.new_full(stacked.shape[:1], 2.0)


def contraction_factors(matrix: Float[Tensor, "n n"]) -> Factors:
    """A matrix with spectral norm ≤ 1 as at most 3n factors with β ∈ [0, 2].

    From M = U Σ Vᵀ: reflections for Vᵀ, then I − (1 − σ_i) e_i e_iᵀ for Σ, then reflections for U.
    Raises `ShapeError` for a matrix that is not square, `ConfigurationError` for a norm above 1 (by more than 10³
    roundings).
    """
    n = _square(matrix)
    left, singular, right = torch.linalg.svd(matrix)
    if float(singular[0]) > 1 + 1e3 * torch.finfo(matrix.dtype).eps:
        raise ConfigurationError(f"the spectral norm is {float(singular[0]):.6g}: a product of factors cannot exceed 1")
    identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
    parts = [orthogonal_factors(right), (identity, (1 - singular).clamp(min=0)), orthogonal_factors(left)]
    return torch.cat([keys for keys, _ in parts]), torch.cat([betas for _, betas in parts])


def permutation_factors(permutation: Sequence[int], *, dtype: torch.dtype = torch.float64) -> Factors:
    """The matrix P with P e_i = e_{permutation[i]} as n − c reflections, c its number of cycles.

    Each is a transposition, k = (e_i − e_j)/√2. No fewer will do: n − c is the rank of P − I.
    Raises `ConfigurationError` for what is no permutation of 0 … n − 1.
    """
    n = len(permutation)
    if sorted(permutation) != list(range(n)):
        raise ConfigurationError(f"{tuple(permutation)} is not a permutation of 0 … {n - 1}")
    keys: list[Tensor] = []
    seen: set[int] = set()
    for start in range(n):
        other = start if start in seen else permutation[start]
        seen.add(start)
        while other != start:
            # The cycle (s a b …) is (s a) first, then (s b), …
            key = torch.zeros(n, dtype=dtype)
            key[start], key[other] = 0.5**0.5, -(0.5**0.5)
            keys.append(key)
            seen.add(other)
            other = permutation[other]
    stacked = torch.stack(keys) if keys else torch.zeros(0, n, dtype=dtype)
    return stacked, stacked.new_full(stacked.shape[:1], 2.0)


def rotation_factors(rotation: Float[Tensor, "3 3"]) -> Factors:
    """A rotation of space as two reflections, in planes through its axis, half its angle apart.

    Raises `ShapeError` unless it is 3×3, `ConfigurationError` unless it is a rotation.
    """
    if rotation.shape != (3, 3):
        raise ShapeError(f"a rotation of space is a 3×3 matrix, got {tuple(rotation.shape)}")
    identity = torch.eye(3, dtype=rotation.dtype)
    close = 1e3 * torch.finfo(rotation.dtype).eps
    if float((rotation.mT @ rotation - identity).abs().max()) > close or float(torch.linalg.det(rotation)) < 0:
        raise ConfigurationError("the matrix is not a rotation: it is not orthogonal, or it reflects")
    # The axis is the eigenvector of R + Rᵀ of the largest eigenvalue; anything across it can be the first key.
    directions = torch.linalg.eigh(rotation + rotation.mT).eigenvectors
    axis, first = directions[:, 2], directions[:, 0]
    halfway = first + rotation @ first
    half_turn = float(halfway.norm()) < close**0.5
    second = torch.linalg.cross(axis, first) if half_turn else halfway / halfway.norm()
    keys = torch.stack([first, second])
    return keys, keys.new_full((2,), 2.0)


def padded(factors: Sequence[Factors], count: int | None = None) -> Factors:
    """Several matrices' factors as tensors (matrices, count, n) and (matrices, count), filled up with β = 0.

    `count` is the largest number of factors if None. Raises `ConfigurationError` if one has more.
    """
    most = max(len(betas) for _, betas in factors)
    count = most if count is None else count
    if most > count:
        raise ConfigurationError(f"one of the matrices has {most} factors, more than {count}")
    n = factors[0][0].shape[-1]
    keys = factors[0][0].new_zeros(len(factors), count, n)
    keys[..., 0] = 1
    betas = keys.new_zeros(len(factors), count)
    for index, (key, beta) in enumerate(factors):
        keys[index, : len(beta)], betas[index, : len(beta)] = key, beta
    return keys, betas


def _square(matrix: Tensor) -> int:
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"the matrix must be square, got {tuple(matrix.shape)}")
    return matrix.shape[0]
