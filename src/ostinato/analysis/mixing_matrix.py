"""The matrix by which a mixer mixes its steps: y = M(x) x, one matrix a head, from the map itself.

Where a mixer computes M(x) v by scans or transforms, its matrix is what it does to unit vectors v with the parameters
held that x gives. Structure can then be looked at: `off_diagonal_ranks` tells a semiseparable matrix from any other.

Source: Hydra (arXiv 2407.09941), section 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.mixers.hydra import Hydra
from ostinato.mixers.matrix_mixer import MatrixMixer
from ostinato.ops.quasiseparable import quasiseparable


@torch.no_grad()
def materialize(
    mixer: Hydra | MatrixMixer, x: Float[Tensor, "batch time d_model"]
) -> Float[Tensor, "batch heads time time"]:
    """The matrices that x gives, out of unit vectors sent through the mixer's own linear part (no residual).

    Raises `ConfigurationError` for a mixer that has no such part.
    """
    batch, time = x.shape[:2]
    units = torch.eye(time, dtype=x.dtype, device=x.device).view(1, time, 1, time)
    if isinstance(mixer, Hydra) and mixer.join == "quasiseparable":
        _, _, *directions, diagonal = mixer.parameters_of_matrix(x)
        past, future = (one._replace(start=None) for one in directions)
        return quasiseparable(units.expand(batch, -1, mixer.heads, -1), past, future, diagonal).transpose(1, 2)
    if isinstance(mixer, MatrixMixer):
        _, _, parts = mixer._made(x, None)
        return mixer._product(x, units.expand(batch, -1, mixer.heads, -1), parts, None).transpose(1, 2)
    raise ConfigurationError(f"{type(mixer).__name__} does not mix its steps by one matrix a head")


def off_diagonal_ranks(
    matrix: Float[Tensor, "... time time"], cuts: Sequence[int], rtol: float = 1e-8
) -> tuple[int, int]:
    """The largest ranks of the blocks below (rows from a cut on, columns before it) and above the diagonal."""
    below = max(int(torch.linalg.matrix_rank(matrix[..., cut:, :cut], rtol=rtol).max()) for cut in cuts)
    above = max(int(torch.linalg.matrix_rank(matrix[..., :cut, cut:], rtol=rtol).max()) for cut in cuts)
    return below, above
