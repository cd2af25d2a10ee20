"""Additive linear attention: the memory is a running mean of values with weights e^k, channel by channel of the key.

    S_t = diag(Δ_{t−1}/Δ_t) S_{t−1} + (δ_t/Δ_t) v_tᵀ,   y_t = S_tᵀ q_t,   δ_t = e^{k_t},   Δ_t = Σ_{s ≤ t} δ_s
        = diag(1/Δ_t) Σ_{s ≤ t} δ_s v_sᵀ

The weight of step s in what t reads is δ_s/Δ_t, whatever lies between them: over a whole sequence it is a softmax, and
one sum serves any number of dimensions. In logarithms, z_t = log Δ_t, it is a gated scan with decay z_{t−1} − z_t and
keys e^{k_t − z_t} ≤ 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.checks import accumulation_dtype, check_finite, check_reset, check_sequence, check_shape
from ostinato.ops.linear_attention import linear_attention
from ostinato.ops.scan import Element, Point, associative_scan


class AdditiveState(NamedTuple):
    """The memory S, and z = log Δ, which is −∞ where nothing has been written."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    log_weight: Float[Tensor, "batch heads logit_dim"]


class LogSumExp:
    """The maps z -> log(e^{a + z} + e^b): affine maps in which + is logaddexp and × is +."""

    def combine(self, first: Element, second: Element) -> Element:
        """(a₁ + a₂, log(e^{a₂ + b₁} + e^{b₂}))."""
        return first[0] + second[0], torch.logaddexp(second[0] + first[1], second[1])

    def act(self, element: Element, point: Point) -> Point:
        """z -> log(e^{a + z} + e^b)."""
        return (torch.logaddexp(element[0] + point[0], element[1]),)


def additive_attention_step(
    query: Float[Tensor, "batch heads key_dim"],
    logit: Float[Tensor, "batch heads key_dim"],
    value: Float[Tensor, "batch heads value_dim"],
    state: AdditiveState,
) -> tuple[Float[Tensor, "batch heads value_dim"], AdditiveState]:
    """One step, the definition; every channel has its own k. Returns y and the state."""
    total = torch.logaddexp(state.log_weight, logit)
    kept = torch.exp(state.log_weight - total).unsqueeze(-1) * state.memory
    memory = kept + torch.exp(logit - total).unsqueeze(-1) * value.unsqueeze(-2)
    return (query.unsqueeze(-2) @ memory).squeeze(-2), AdditiveState(memory, total)


def running_log_weights(
    logits: Float[Tensor, "batch time ..."],
    initial: Float[Tensor, "batch ..."],
    reset: Bool[Tensor, "batch time"] | None = None,
    restart: float | None = None,
) -> tuple[Float[Tensor, "batch time ..."], Float[Tensor, "batch time ..."]]:
    """z_t = log(e^{z_{t−1}} + e^{k_t}) from z_0 = `initial`, and log λ_t = z_{t−1} − z_t.

    At a reset z begins again from `restart`, −∞ if None. Where there is nothing to forget, at the first step from −∞
    and at resets, log λ is 0: the memory that it would multiply is empty. Computed in the type of `logits`: cast half
    precision first.
    """
    if reset is None:
        totals = torch.logcumsumexp(torch.cat([initial.unsqueeze(1), logits], dim=1), dim=1)
        before, totals = totals[:, :-1], totals[:, 1:]
    else:
        begins = reset.view(*reset.shape, *[1] * (logits.ndim - 2))
        kept = torch.zeros_like(logits).masked_fill(begins, -torch.inf)
        added = logits
        if restart is not None:
            added = torch.where(begins, torch.logaddexp(logits, logits.new_tensor(restart)), logits)
        (totals,) = associative_scan(LogSumExp(), (kept, added), (initial,))
        before = torch.cat([initial.unsqueeze(1), totals[:, :-1]], dim=1).masked_fill(begins, -torch.inf)
    empty = before == -torch.inf
    return totals, torch.where(empty, totals, before) - totals


def additive_attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    logits: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    state: AdditiveState | None = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time heads value_dim"], AdditiveState]:
    """All reads y_t = S_tᵀ q_t of the running means with weights e^k.

    Args:
        queries: q, unscaled.
        logits: k, of any sign; no weight is ever formed without its sum.
        values: v.
        state: S_0 and z_0; empty if None. A z_0 of 0 gives the empty memory the weight 1 (one of the two published
            implementations starts there).
        reset: True marks the first step of a new sequence: there the memory is empty.
        validate: look for NaN and infinity in queries, logits and values first.

    Returns:
        The outputs in the type of `queries`, and the last state. Half precision is computed, and its state kept, in
        float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        NonFiniteError: with `validate`.

    Source: LightNet (arXiv 2405.21022), section 4.1.
    """
    check_sequence("queries", queries, "batch time heads key_dim")
    check_shape("logits", logits, tuple(queries.shape), "batch time heads key_dim, as queries")
    check_sequence("values", values, "batch time heads value_dim")
    batch, time, heads, key_dim = queries.shape
    if values.shape[:3] != queries.shape[:3]:
        raise ShapeError(f"values have shape {tuple(values.shape)} for queries {tuple(queries.shape)}")
    check_reset(reset, batch, time)
    if validate:
        check_finite(queries=queries, logits=logits, values=values)
    dtype = accumulation_dtype(queries.dtype)
    if state is None:
        state = empty_state(queries, values)
    check_shape("memory", state.memory, (batch, heads, key_dim, values.shape[-1]), "batch heads key_dim value_dim")
    check_shape("log_weight", state.log_weight, (batch, heads, key_dim), "batch heads key_dim")
    wide = logits.to(dtype)
    totals, log_decay = running_log_weights(wide, state.log_weight.to(dtype), reset)
    keys = torch.exp(wide - totals)
    outputs, memory = linear_attention(
        queries.to(dtype), keys, values.to(dtype), log_decay, state.memory.to(dtype), reset=reset
    )
    return outputs.to(queries.dtype), AdditiveState(memory, totals[:, -1])


def empty_state(queries: Tensor, values: Tensor) -> AdditiveState:
    """The state before the first step: nothing written."""
    batch, _, heads, key_dim = queries.shape
    dtype = accumulation_dtype(queries.dtype)
    return AdditiveState(
        queries.new_zeros(batch, heads, key_dim, values.shape[-1], dtype=dtype),
        queries.new_full((batch, heads, key_dim), -torch.inf, dtype=dtype),
    )
