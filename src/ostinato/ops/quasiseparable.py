"""Quasiseparable matrices times a sequence: one scan for the past, one for the future, and a free diagonal.

    m_ij = c→_{i−1}ᵀ A→_{i−1} ⋯ A→_{j+1} b→_j   for j < i,      δ_i   for j = i,      the mirror image   for j > i

Below and above the diagonal the matrix is semiseparable, with ranks of at most the width N of b and c. Each scan gives
the triangle with its diagonal; moved on by one step it gives the strict triangle, so that no step is counted twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.checks import accumulation_dtype, check_reset, check_sequence, check_shape
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.sequences import places, reversed_reset


class Direction(NamedTuple):
    """What one scan reads with, writes at, and forgets by."""

    queries: Float[Tensor, "batch time heads state"]
    """c."""
    keys: Float[Tensor, "batch time heads state"]
    """b."""
    log_decay: Float[Tensor, "batch time heads"] | None
    """log A ≤ 0."""
    steps: Float[Tensor, "batch time heads"] | None = None
    """Δ, a factor on what is written; None for 1."""
    start: Float[Tensor, "heads state dim"] | None = None
    """What the memory holds where a sequence begins (for the future: behind its end); None for nothing."""


def two_scans(
    values: Float[Tensor, "batch time heads dim"],
    past: Direction,
    future: Direction,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
) -> tuple[Float[Tensor, "batch time heads dim"], Float[Tensor, "batch time heads dim"]]:
    """The outputs of both scans, each with its diagonal: y→_t = c_tᵀ Σ_{s ≤ t} … and y←_t = c_tᵀ Σ_{s ≥ t} ….

    The two run as one, stacked along the batch. Raises `ShapeError`, `DtypeError`.
    """
    check_sequence("values", values, "batch time heads dim")
    check_reset(reset, values.shape[0], values.shape[1])
    if (past.log_decay is None) != (future.log_decay is None) or (past.steps is None) != (future.steps is None):
        raise ShapeError("both directions have decays, or steps, or neither has")
    written = [values if one.steps is None else values * one.steps.unsqueeze(-1) for one in (past, future)]
    decays = None
    if past.log_decay is not None and future.log_decay is not None:
        decays = torch.cat([past.log_decay, future.log_decay.flip(1)])
    outputs, _ = linear_attention(
        torch.cat([past.queries, future.queries.flip(1)]),
        torch.cat([past.keys, future.keys.flip(1)]),
        torch.cat([written[0], written[1].flip(1)]),
        decays,
        reset=None if reset is None else torch.cat([reset, reversed_reset(reset)]),
    )
    forward, backward = outputs.chunk(2)
    backward = backward.flip(1)
    if past.start is not None:
        forward = forward + _read_start(past, reset)
    if future.start is not None:
        turned = None if reset is None else reversed_reset(reset)
        backward = backward + _read_start(_turned(future), turned).flip(1)
    return forward, backward


def _turned(one: Direction) -> Direction:
    """The direction in time reversed."""
    return Direction(
        one.queries.flip(1),
        one.keys.flip(1),
        None if one.log_decay is None else one.log_decay.flip(1),
        None if one.steps is None else one.steps.flip(1),
        one.start,
    )


def _read_start(one: Direction, reset: Tensor | None) -> Tensor:
    """c_tᵀ A_t ⋯ A_1 S_0, the product from the beginning of t's own sequence."""
    read = torch.einsum("bthn,hnd->bthd", one.queries, one.start)
    if one.log_decay is None:
        return read
    total = one.log_decay.cumsum(1)
    if reset is not None:
        batch, time = reset.shape
        first = torch.arange(time, device=reset.device) - places(reset, batch, time, reset.device)
        before = F.pad(total, (0, 0, 1, 0))[:, :-1]
        total = total - before.gather(1, first.unsqueeze(-1).expand_as(total))
    return read * total.exp().unsqueeze(-1)


def quasiseparable(
    values: Float[Tensor, "batch time heads dim"],
    past: Direction,
    future: Direction,
    diagonal: Float[Tensor, "batch time heads"],
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time heads dim"]:
    """y = shift(SS→ x) + shift←(SS← x) + δ ⊙ x, in O(T) work and memory.

    Args:
        values: x.
        past, future: the two triangles; `future` in the order of time, it is turned here.
        diagonal: δ.
        reset: True marks the first step of a new sequence: nothing crosses it, either way.

    Returns:
        y; of half precision in float32, not rounded. A norm mostly follows, under which the gradient of the diagonal
        is a sum that nearly cancels: rounding y would cost it up to 0.4 of its size in bfloat16 (measured, d_model 16).

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.

    Source: Hydra (arXiv 2407.09941), section 3.2 and the authors' module.
    """
    batch, time, heads, _ = values.shape
    check_shape("diagonal", diagonal, (batch, time, heads), "batch time heads")
    wide = accumulation_dtype(values.dtype)
    forward, backward = (part.to(wide) for part in two_scans(values, past, future, reset=reset))
    behind = F.pad(forward[:, :-1], (0, 0, 0, 0, 1, 0))
    ahead = F.pad(backward[:, 1:], (0, 0, 0, 0, 0, 1))
    if reset is not None:
        begins = reset.view(batch, time, 1, 1)
        ends = F.pad(reset[:, 1:], (0, 1)).view(batch, time, 1, 1)
        behind, ahead = behind.masked_fill(begins, 0), ahead.masked_fill(ends, 0)
    return behind + ahead + diagonal.to(wide).unsqueeze(-1) * values.to(wide)


def quasiseparable_matrix(
    past: Direction, future: Direction, diagonal: Float[Tensor, "batch time heads"]
) -> Float[Tensor, "batch heads time time"]:
    """The matrix itself, entry by entry from its definition: O(T²) memory, for tests and for looking at."""
    lower = _semiseparable(past)
    upper = _semiseparable(_turned(future)).flip(-1, -2)
    time = diagonal.shape[1]
    # Row i reads with the query of step i − 1, the last step that its scan had seen (i + 1, coming from behind).
    strict_lower = F.pad(lower[..., :-1, :], (0, 0, 1, 0)).tril(-1)
    strict_upper = F.pad(upper[..., 1:, :], (0, 0, 0, 1)).triu(1)
    middle = torch.eye(time, dtype=diagonal.dtype, device=diagonal.device) * diagonal.transpose(1, 2).unsqueeze(-1)
    return strict_lower + strict_upper + middle


def _semiseparable(one: Direction) -> Tensor:
    """c_iᵀ A_i ⋯ A_{j+1} b_j Δ_j for j ≤ i, else 0; (batch, heads, time, time)."""
    scores = torch.einsum("bihn,bjhn->bhij", one.queries, one.keys)
    if one.steps is not None:
        scores = scores * one.steps.transpose(1, 2).unsqueeze(-2)
    if one.log_decay is not None:
        total = one.log_decay.transpose(1, 2).cumsum(-1)
        exponent = total.unsqueeze(-1) - total.unsqueeze(-2)
        seen = torch.ones_like(exponent, dtype=torch.bool).tril()
        scores = scores * exponent.masked_fill(~seen, -torch.inf).exp()
    return scores.tril()
