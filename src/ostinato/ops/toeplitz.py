"""Toeplitz matrices times a sequence by Fourier transform: m_ij = f_{i−j} on and below the diagonal, r_{j−i} above."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.checks import HALF
from ostinato.ops.long_convolution import fast_length


def toeplitz(
    below: Float[Tensor, "*batch time"],
    above: Float[Tensor, "*batch time"],
    values: Float[Tensor, "*batch time dim"],
    *,
    displaced: bool = False,
) -> Float[Tensor, "*batch time dim"]:
    """M v in O(T log T), for every channel of v.

    Args:
        below: f_0 … f_{T−1}.
        above: r_0 … r_{T−1}; r_0 is not used.
        values: v.
        displaced: the released code's matrix instead, a circulant of 2T − 1 that is off by one: m_ii = f_1, the first
            superdiagonal f_0, the rest of r one further out, and r_{T−1} in the lower corner.

    Half precision is computed in float32. Raises `ShapeError` for arguments that do not fit together.
    Source: Hydra (arXiv 2407.09941), section 2; the displacement is that of the authors' code.
    """
    time = values.shape[-2]
    if below.shape != values.shape[:-1] or above.shape != below.shape:
        raise ShapeError(
            f"below and above have one number for each step of values: {tuple(below.shape)} and {tuple(above.shape)} "
            f"for {tuple(values.shape)}"
        )
    dtype = torch.float32 if values.dtype in HALF else values.dtype
    f, r, v = below.to(dtype), above.to(dtype), values.to(dtype)
    size = 2 * time - 1 if displaced else fast_length(2 * time - 1)
    if displaced:
        circulant = torch.cat([f, r[..., 1:].flip(-1)], dim=-1).roll(-1, dims=-1)
    else:
        middle = f.new_zeros(*f.shape[:-1], size - (2 * time - 1))
        circulant = torch.cat([f, middle, r[..., 1:].flip(-1)], dim=-1)
    spectrum = torch.fft.rfft(circulant, n=size).unsqueeze(-1) * torch.fft.rfft(v, n=size, dim=-2)
    return torch.fft.irfft(spectrum, n=size, dim=-2)[..., :time, :].to(values.dtype)


def toeplitz_matrix(
    below: Float[Tensor, "*batch time"], above: Float[Tensor, "*batch time"]
) -> Float[Tensor, "*batch time time"]:
    """The matrix itself: O(T²) memory."""
    time = below.shape[-1]
    index = torch.arange(time, device=below.device)
    distance = index.unsqueeze(1) - index
    return torch.where(distance >= 0, below[..., distance.clamp(min=0)], above[..., (-distance).clamp(min=0)])
