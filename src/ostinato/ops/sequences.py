"""Sums over whole sequences of a packed row: what every step of a sequence sees alike, first step and last.

A row may hold several sequences; `reset` marks where each begins. The sums of all sequences are had at once, in shapes
that do not depend on where they begin.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.linear_attention import check_matrix_arguments, linear_attention


def sequence_numbers(reset: Bool[Tensor, "batch time"]) -> Int[Tensor, "batch time"]:
    """Which sequence of its row each step belongs to: 0, 0, 0, 1, 1, …"""
    return reset.long().cumsum(1)


def same_sequence(reset: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time time"]:
    """Whether two steps belong to one sequence."""
    numbers = sequence_numbers(reset)
    return numbers.unsqueeze(2) == numbers.unsqueeze(1)


def places(
    reset: Bool[Tensor, "batch time"] | None, batch: int, time: int, device: torch.device
) -> Int[Tensor, "batch time"]:
    """The place of every step in its own sequence, from 0."""
    index = torch.arange(time, device=device).expand(batch, time)
    if reset is None:
        return index
    began = torch.where(reset, index, torch.zeros_like(index)).cummax(dim=1).values
    return index - began


def reversed_reset(reset: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """The marks of the row read backwards: a sequence begins there at what is its last step here."""
    return torch.cat([torch.zeros_like(reset[:, :1]), reset.flip(1)[:, :-1]], dim=1)


def sequence_sum(
    x: Float[Tensor, "batch time ..."], reset: Bool[Tensor, "batch time"] | None = None
) -> Float[Tensor, "batch steps ..."]:
    """At every step the sum of x over its sequence; one step for all without `reset`."""
    if reset is None:
        return x.sum(1, keepdim=True)
    index = sequence_numbers(reset).view(*reset.shape, *[1] * (x.ndim - 2)).expand_as(x)
    # A sequence's number is at most `time`; there is room for one more than can begin.
    room = x.new_zeros(x.shape[0], x.shape[1] + 1, *x.shape[2:])
    return room.scatter_add(1, index, x).gather(1, index)


def sequence_max(
    x: Float[Tensor, "batch time ..."], reset: Bool[Tensor, "batch time"] | None = None
) -> Float[Tensor, "batch steps ..."]:
    """At every step the maximum of x over its sequence; one step for all without `reset`. No gradient."""
    x = x.detach()
    if reset is None:
        return x.amax(1, keepdim=True)
    index = sequence_numbers(reset).view(*reset.shape, *[1] * (x.ndim - 2)).expand_as(x)
    room = x.new_full((x.shape[0], x.shape[1] + 1, *x.shape[2:]), -torch.inf)
    return room.scatter_reduce(1, index, x, "amax").gather(1, index)


def sequence_softmax(
    x: Float[Tensor, "batch time ..."], reset: Bool[Tensor, "batch time"] | None = None
) -> Float[Tensor, "batch time ..."]:
    """The softmax of every channel over the steps of each sequence; a channel that is −∞ everywhere gives zeros."""
    top = sequence_max(x, reset)
    shifted = torch.exp(x - torch.where(top == -torch.inf, 0.0, top))
    return shifted / sequence_sum(shifted, reset).clamp(min=torch.finfo(shifted.dtype).tiny)


def whole_attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time heads value_dim"]:
    """y_t = (Σ_s k_s v_sᵀ)ᵀ q_t, the sum over all steps s of t's sequence: linear attention that is not causal.

    One product without `reset`; two scans with it, the past and, read backwards, what is strictly ahead. O(T) either
    way. Half precision is summed in float32; the output has the type of `queries`.

    Raises `ShapeError`, `DtypeError` for arguments that do not fit together.
    Source: Hydra (arXiv 2407.09941), section 2 (low-rank mixers); LightNet (arXiv 2405.21022), its one scan.
    """
    if reset is None:
        check_matrix_arguments(queries, keys, values, None, None, None)
        dtype = accumulation_dtype(queries.dtype)
        memory = keys.to(dtype).permute(0, 2, 3, 1) @ values.to(dtype).transpose(1, 2)
        return (queries.to(dtype).transpose(1, 2) @ memory).transpose(1, 2).to(queries.dtype)
    past, _ = linear_attention(queries, keys, values, reset=reset)
    turned = queries.flip(1), keys.flip(1), values.flip(1)
    ahead, _ = linear_attention(*turned, reset=reversed_reset(reset))
    itself = (queries * keys).sum(-1, keepdim=True) * values
    return past + ahead.flip(1) - itself
