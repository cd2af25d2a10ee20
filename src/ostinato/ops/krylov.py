"""Krylov matrices by doubling: (b, A b, A² b, …) for dense A, the kernel of a linear system as LSSL computed it.

It takes O(N² L) work and O(N L) memory a system: the cost that the generating function of `state_space.py` avoids.
"""

from __future__ import annotations

import torch
from jaxtyping import Inexact
from torch import Tensor

from ostinato.errors import ConfigurationError


def krylov(
    matrix: Inexact[Tensor, "... size size"], vector: Inexact[Tensor, "... size"], length: int
) -> Inexact[Tensor, "... size length"]:
    """X = (b, A b, …, A^{L−1} b): X ← [X, A^l X] and A^l ← (A^l)², with l the columns so far.

    Raises `ConfigurationError` for a length below 1. Computed in the type of the arguments.

    Source: LSSL (arXiv 2110.13985), section 3 and the authors' code.
    """
    if length < 1:
        raise ConfigurationError(f"a Krylov matrix has at least one column, got length {length}")
    columns = vector.unsqueeze(-1)
    while columns.shape[-1] < length:
        wanted = min(columns.shape[-1], length - columns.shape[-1])
        columns = torch.cat([columns, matrix @ columns[..., :wanted]], dim=-1)
        if columns.shape[-1] < length:
            matrix = matrix @ matrix
    return columns


def krylov_kernel(
    matrix: Inexact[Tensor, "... size size"],
    inputs: Inexact[Tensor, "... size"],
    outputs: Inexact[Tensor, "... size"],
    length: int,
) -> Inexact[Tensor, "... length"]:
    """K_t = C Ā^t B̄ for t < L, of x_t = Ā x_{t−1} + B̄ u_t, y_t = C x_t."""
    return (outputs.unsqueeze(-2) @ krylov(matrix, inputs, length)).squeeze(-2)
