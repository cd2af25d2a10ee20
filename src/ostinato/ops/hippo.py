"""HiPPO: state matrices that remember, and their diagonal and diagonal-plus-low-rank forms.

A linear system x' = A x + B u whose A is a HiPPO matrix keeps, in x, the coefficients of the past of u in a basis
of orthogonal functions. The dense matrices are for definition and test. Layers use V* A V = Λ − P P*, diagonal
plus low rank (S4), or Λ alone (S4D, S5). All matrices here are stable (their eigenvalues have negative real
parts) and float64: in float32 the eigenvectors of LegS are lost beyond N ≈ 64.

Complex systems that stand for real ones store one of each pair of conjugate coordinates, so N real coordinates are
N/2 complex numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from ostinato.errors import ConfigurationError

MEASURES = ("legs", "legt", "lagt", "fout")
DIAGONALS = ("lin", "inv", "legs", "quad", "real")


class DiagonalPlusLowRank(NamedTuple):
    """x' = (Λ − P P*) x + B u in the basis V: one of each pair of conjugate coordinates."""

    eigenvalues: Complex[Tensor, " half"]
    low_rank: Complex[Tensor, "rank half"]
    inputs: Complex[Tensor, " half"]
    basis: Complex[Tensor, "size half"]


def hippo_matrix(measure: str, size: int) -> tuple[Float[Tensor, "size size"], Float[Tensor, " size"]]:
    """(A, B) of a HiPPO system, float64.

    - legs (scaled Legendre, the whole past): A[n,k] = −√(2n+1)√(2k+1) for n > k, −(n+1) for n = k, 0 above;
      B[n] = √(2n+1). Eigenvalues −1 … −N.
    - legt (Legendre on a sliding window of 2 time units): A[n,k] = −½√(2n+1)√(2k+1)·(1 if n ≥ k else (−1)^{n−k}),
      B[n] = ½√(2n+1).
    - lagt (Laguerre, fading): A = ½I − tril(1), B = 1.
    - fout (Fourier on a sliding window): B = (1, 0, √2, 0, √2, …), A = −B Bᵀ plus rotations by πk in the planes
      (2k, 2k+1).

    Raises `ConfigurationError` for another measure, or an odd or non-positive size.

    Source: HiPPO (arXiv 2008.07669); LSSL (arXiv 2110.13985), appendix B; How to Train Your HiPPO (arXiv 2206.12037).
    """
    if measure not in MEASURES:
        raise ConfigurationError(f"there is no measure {measure!r}; known: {', '.join(MEASURES)}")
    _check_size(size)
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    if measure == "legs":
        return -torch.tril(torch.outer(root, root), -1) - torch.diag(n + 1), root
    if measure == "legt":
        row, column = n.unsqueeze(1), n.unsqueeze(0)
        sign = torch.where(row >= column, 1.0, 1.0 - 2.0 * ((row - column).abs() % 2))
        return -0.5 * torch.outer(root, root) * sign, 0.5 * root
    if measure == "lagt":
        ones = torch.ones(size, size, dtype=torch.float64)
        return 0.5 * torch.eye(size, dtype=torch.float64) - torch.tril(ones), torch.ones(size, dtype=torch.float64)
    inputs = torch.zeros(size, dtype=torch.float64)
    inputs[::2] = math.sqrt(2)
    inputs[0] = 1
    matrix = -torch.outer(inputs, inputs)
    for k in range(1, size // 2):
        matrix[2 * k, 2 * k + 1] -= math.pi * k
        matrix[2 * k + 1, 2 * k] += math.pi * k
    return matrix, inputs


def low_rank_part(measure: str, size: int) -> Float[Tensor, "rank size"]:
    """P with A + Σ_r P_r P_rᵀ = a·I + skew-symmetric, hence normal: rank 1 for legs and fout, 2 for legt.

    Raises `ConfigurationError` for a measure that has none here.

    Source: S4 (arXiv 2111.00396), theorem 1 and appendix C.
    """
    _check_size(size)
    n = torch.arange(size, dtype=torch.float64)
    if measure == "legs":
        return torch.sqrt(n + 0.5).unsqueeze(0)
    if measure == "legt":
        root = torch.sqrt(n + 0.5)
        return torch.stack([root * (n % 2), root * (1 - n % 2)])
    if measure == "fout":
        return hippo_matrix("fout", size)[1].unsqueeze(0)
    raise ConfigurationError(f"there is no low-rank form for measure {measure!r}; known: legs, legt, fout")


def diagonal_plus_low_rank(measure: str, size: int) -> DiagonalPlusLowRank:
    """The HiPPO system in the basis in which it is diagonal plus low rank: V* A V = Λ − P P*, complex128.

    A + P Pᵀ = a·I + K with K skew: −iK is Hermitian, so V is unitary and comes from `eigh`, never from an
    eigen-decomposition of A itself, whose eigenvectors are exponentially ill-conditioned. Kept are the N/2
    coordinates with negative imaginary part. Λ has real part −½ for legs and 0 for legt and fout. fout has one
    pair of zero eigenvalues, whose eigenvectors are chosen conjugate to each other.

    "random" (an ablation) draws Λ = −|N(0,1)| + iπN(0,1) and complex normal P, B; its basis is the identity.

    Source: S4 (arXiv 2111.00396), section 3.1 and appendix C.
    """
    _check_size(size)
    half = size // 2
    if measure == "random":
        eigenvalues = torch.complex(
            -torch.randn(half, dtype=torch.float64).abs(), torch.randn(half, dtype=torch.float64) * math.pi
        )
        low_rank, inputs = (torch.randn(rows, half, dtype=torch.complex128) for rows in (1, 1))
        return DiagonalPlusLowRank(eigenvalues, low_rank, inputs[0], torch.eye(size, half, dtype=torch.complex128))
    matrix, inputs_real = hippo_matrix(measure, size)
    low_rank_real = low_rank_part(measure, size)
    normal = matrix + low_rank_real.T @ low_rank_real
    shift = normal.diagonal().mean()
    skew = normal - shift * torch.eye(size, dtype=torch.float64)
    frequencies, vectors = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    frequencies, basis = frequencies[:half], vectors[:, :half].clone()
    if frequencies[-1].abs() < 1e-9 * size:
        # A double zero: any orthonormal pair spans it, but the two coordinates must be each other's conjugates.
        null = vectors[:, half - 1 : half + 1]
        span = torch.linalg.svd(torch.cat([null.real, null.imag], dim=1), full_matrices=False).U
        basis[:, -1] = torch.complex(span[:, 0], span[:, 1]) / math.sqrt(2)
        frequencies = torch.cat([frequencies[:-1], frequencies.new_zeros(1)])
    return DiagonalPlusLowRank(
        torch.complex(shift.expand(half), frequencies),
        low_rank_real.to(basis.dtype) @ basis.conj(),
        basis.mH @ inputs_real.to(basis.dtype),
        basis,
    )


def diagonal_system(name: str, size: int) -> tuple[Complex[Tensor, " half"], Complex[Tensor, " half"]]:
    """(Λ, B) of the diagonal initialisations of S4D, N/2 coordinates, complex128.

    lin: −½ + iπn. inv: −½ + i(N/π)(N/(2n+1) − 1). quad: −½ + i(1+2n)²/π. real: −(n+1). legs: the diagonal part of
    `diagonal_plus_low_rank("legs")` and its B. B = 1 but for legs. Raises `ConfigurationError` for another name.

    Source: S4D (arXiv 2206.11893), section 4.
    """
    if name not in DIAGONALS:
        raise ConfigurationError(f"there is no diagonal initialisation {name!r}; known: {', '.join(DIAGONALS)}")
    _check_size(size)
    if name == "legs":
        system = diagonal_plus_low_rank("legs", size)
        return system.eigenvalues, system.inputs
    n = torch.arange(size // 2, dtype=torch.float64)
    real, imaginary = torch.full_like(n, -0.5), torch.zeros_like(n)
    if name == "lin":
        imaginary = math.pi * n
    elif name == "inv":
        imaginary = size / math.pi * (size / (2 * n + 1) - 1)
    elif name == "quad":
        imaginary = (1 + 2 * n).square() / math.pi
    else:
        real = -(n + 1)
    return torch.complex(real, imaginary), torch.ones(size // 2, dtype=torch.complex128)


def discretize(
    matrix: Float[Tensor, "size size"], inputs: Float[Tensor, " size"], step: float, *, alpha: float | None = 0.5
) -> tuple[Float[Tensor, "size size"], Float[Tensor, " size"]]:
    """(Ā, B̄) of a dense system: the generalised bilinear transform, or zero-order hold with `alpha=None`.

    Ā = (I − αΔA)^{-1}(I + (1−α)ΔA), B̄ = Δ(I − αΔA)^{-1}B: α = 0 is Euler, 1 backward Euler, ½ bilinear.
    Zero-order hold: Ā = e^{ΔA}, B̄ = A^{-1}(e^{ΔA} − I)B, both from one exponential of [[A, B], [0, 0]].

    Source: LSSL (arXiv 2110.13985), section 2.
    """
    size = matrix.shape[0]
    if alpha is None:
        joint = matrix.new_zeros(size + 1, size + 1)
        joint[:size, :size], joint[:size, size] = matrix * step, inputs * step
        joint = torch.linalg.matrix_exp(joint)
        return joint[:size, :size], joint[:size, size]
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    left = identity - alpha * step * matrix
    right = torch.cat([identity + (1 - alpha) * step * matrix, (step * inputs).unsqueeze(1)], dim=1)
    both = torch.linalg.solve(left, right)
    return both[:, :size], both[:, size]


def discretize_diagonal(
    eigenvalues: Complex[Tensor, " ..."], step: Float[Tensor, " ..."], method: str = "zoh"
) -> tuple[Complex[Tensor, " ..."], Complex[Tensor, " ..."]]:
    """(Ā, B̄/B) of diagonal systems, element by element.

    zoh: e^{ΔΛ} and (e^{ΔΛ} − 1)/Λ. bilinear: (1 + ΔΛ/2)/(1 − ΔΛ/2) and Δ/(1 − ΔΛ/2). Raises `ConfigurationError`
    for another method.

    Source: S4D (arXiv 2206.11893), section 3.1; S5 (arXiv 2208.04933), equation 6.
    """
    scaled = eigenvalues * step
    if method == "zoh":
        return torch.exp(scaled), torch.expm1(scaled) / eigenvalues
    if method == "bilinear":
        return (1 + scaled / 2) / (1 - scaled / 2), step / (1 - scaled / 2)
    raise ConfigurationError(f"there is no discretisation {method!r}; known: zoh, bilinear")


def _check_size(size: int) -> None:
    if size < 2 or size % 2:
        raise ConfigurationError(f"the state size must be even and positive, got {size}")
