"""The classes of structured matrices that mix a sequence: what each is made of, and what it does to values.

A kind is a function from parameters to the matrix (batch, heads, time, time), row t of which says what step t takes
from every step. In a row that holds several sequences, places are counted from the start of each, and what lies
between sequences is zero.

    dense          m_tl free                                                      learned alone
    toeplitz       m_tl = f_{t−l} for l ≤ t, r_{l−t} above                         O(T log T)
    vandermonde    m_tl = Σ_d [cos(2π c q_td l) − cos(2π c k_ld t)], c = 10⁻³      (+ and c = 1 where learned alone)
    dft            m_tl = cos(2π t l / L)                                         nothing to learn
    cauchy         m_tl = Σ_d 1 / (e^{q_td} + e^{k_ld} + 2b + ε)
    low_rank       m_tl = q_t · k_l                                               O(T)
    attention      m_tl = softmax_l(q_t · k_l / √d)
    quasiseparable two scans and a diagonal (`ostinato.ops.quasiseparable`)       O(T)

Source: Hydra (arXiv 2407.09941), section 2 and table 1, in the form of the authors' code.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KINDS = ("dense", "toeplitz", "vandermonde", "dft", "cauchy", "low_rank", "attention", "quasiseparable")
LEARNED_ALONE = ("dense", "dft")
"""Kinds whose matrix no token can make."""
SLOW_TURNS = 1e-3
"""The factor on the frequencies of a data-dependent Vandermonde matrix."""
EPS = 1e-8

Matrix = Float[Tensor, "batch heads time time"]
Parts = Float[Tensor, "batch time heads qk_dim"]


def scale_of(kind: str, length: int, qk_dim: int) -> float:
    """What M is multiplied by so that M v is about as large as v; the paper's `std`.

    With several sequences in a row each has its own length, and this is no longer one number: see `scales`.
    """
    return float(scales(kind, torch.tensor([length], dtype=torch.float64), qk_dim)[0])


def scales(kind: str, lengths: Tensor, qk_dim: int) -> Tensor:
    """`scale_of`, for the length of the sequence that each step belongs to."""
    if kind in ("dense", "dft"):
        return lengths**-0.5
    if kind == "toeplitz":
        return 0.5 * lengths**-0.5
    if kind == "vandermonde":
        return (2 * lengths * qk_dim) ** -0.5
    if kind in ("cauchy", "low_rank"):
        return (qk_dim * lengths) ** -0.5
    return torch.ones_like(lengths)


def vandermonde_matrix(
    queries: Parts, keys: Parts, places: Int[Tensor, "batch time"], *, data_dependent: bool
) -> Matrix:
    """Σ_d [cos(2π c q_td l) ∓ cos(2π c k_ld t)]."""
    factor, sign = (SLOW_TURNS, -1.0) if data_dependent else (1.0, 1.0)
    # All factors on the places: what has five axes is touched as seldom as can be.
    turns = 2 * math.pi * factor * places.to(queries.dtype)
    first = torch.cos(torch.einsum("bthd,bl->bhtld", queries, turns)).sum(-1)
    second = torch.cos(torch.einsum("blhd,bt->bhtld", keys, turns)).sum(-1)
    return first + sign * second


def dft_matrix(
    places: Int[Tensor, "batch time"], lengths: Int[Tensor, "batch time"], heads: int, dtype: torch.dtype
) -> Matrix:
    """cos(2π t l / L), with L the length of t's own sequence; t l is taken modulo L before it is divided."""
    product = places.unsqueeze(2) * places.unsqueeze(1)
    turns = torch.remainder(product, lengths.unsqueeze(2)).to(dtype) / lengths.unsqueeze(2)
    return torch.cos(2 * math.pi * turns).unsqueeze(1).expand(-1, heads, -1, -1)


def cauchy_matrix(queries: Parts, keys: Parts, offset: Float[Tensor, " 1"]) -> Matrix:
    """Σ_d 1 / (e^{q_td} + b + e^{k_ld} + b + ε)."""
    q, k = queries.exp() + (offset + EPS), keys.exp() + offset
    return (1 / (q.transpose(1, 2).unsqueeze(3) + k.transpose(1, 2).unsqueeze(2))).sum(-1)


def low_rank_matrix(queries: Parts, keys: Parts) -> Matrix:
    """q_t · k_l."""
    return torch.einsum("bthd,blhd->bhtl", queries, keys)


def attention_matrix(queries: Parts, keys: Parts, same: Bool[Tensor, "batch time time"] | None) -> Matrix:
    """softmax over l of q_t · k_l / √d, within the sequence."""
    scores = low_rank_matrix(queries, keys) / math.sqrt(queries.shape[-1])
    if same is not None:
        scores = scores.masked_fill(~same.unsqueeze(1), torch.finfo(scores.dtype).min)
    return scores.softmax(-1)


def toeplitz_matrix_of(
    below: Float[Tensor, "batch time heads"],
    above: Float[Tensor, "batch time heads"],
    places: Int[Tensor, "batch time"],
    starts: Int[Tensor, "batch time"],
) -> Matrix:
    """f_{t−l} or r_{l−t}, where f_j is what the j-th step of the same sequence says."""
    distance = places.unsqueeze(2) - places.unsqueeze(1)
    index = (starts.unsqueeze(2) + distance.abs()).clamp(max=places.shape[1] - 1)
    heads = below.shape[-1]

    def picked(x: Tensor) -> Tensor:
        wide = index.unsqueeze(1).expand(-1, heads, -1, -1)
        return x.transpose(1, 2).unsqueeze(2).expand(*wide.shape).gather(3, wide)

    return torch.where((distance >= 0).unsqueeze(1), picked(below), picked(above))
