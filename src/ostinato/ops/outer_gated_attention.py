"""`outer_gated_attention`: S_t = (α_t β_tᵀ) ⊙ S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t.

Linear attention whose memory forgets by key channel and by value channel: the gate is an outer product. It is the
general form from which GLA sets β = 1.

With B and D the products of the α and of the β up to a step, a chunk is plain gated linear attention of the values
v ⊘ D whose outputs are multiplied by D. That overflows under strong decay, as keys ⊘ B do; so the lower triangle of a
chunk is cut in halves (see `ostinato.ops.chunks`) for the values too: late rows read early columns through the last
early token R, with factors D_i ⊘ D_R and D_R ⊘ D_j, all at most 1.

Source: GLA (arXiv 2312.06635), section 4: the general form of the gate.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.ops.checks import check_finite, check_sequence, check_shape, in_accumulation_dtype
from ostinato.ops.chunk_states import chunk_states
from ostinato.ops.chunks import check_chunk_size, chunk_length, cut, join
from ostinato.ops.linear_attention import check_matrix_arguments, linear_attention_step, zero_state
from ostinato.ops.routes import Engine

_engine = Engine("outer_gated_attention")


def outer_gated_attention_step(
    query: Float[Tensor, "batch heads key_dim"],
    key: Float[Tensor, "batch heads key_dim"],
    value: Float[Tensor, "batch heads value_dim"],
    log_value_decay: Float[Tensor, "batch heads value_dim"],
    log_decay: Float[Tensor, "batch heads"] | Float[Tensor, "batch heads key_dim"] | None,
    state: Float[Tensor, "batch heads key_dim value_dim"],
) -> tuple[Float[Tensor, "batch heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """One step, the definition: S = (exp(g) exp(e)ᵀ) ⊙ S' + k vᵀ, y = Sᵀ q. Returns y and S."""
    return linear_attention_step(query, key, value, log_decay, state * log_value_decay.exp().unsqueeze(-2))


@_engine.route("reference")
@in_accumulation_dtype
def _reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_value_decay: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    outputs = []
    state = zero_state(queries, keys, values) if state is None else state
    for t in range(queries.shape[1]):
        if reset is not None:
            state = state.masked_fill(reset[:, t].view(-1, 1, 1, 1), 0)
        decay = None if log_decay is None else log_decay[:, t]
        output, state = outer_gated_attention_step(
            queries[:, t], keys[:, t], values[:, t], log_value_decay[:, t], decay, state
        )
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def _one_step(queries: Tensor, *_: object) -> str | None:
    return "a single step needs no chunks" if queries.shape[1] == 1 else None


@_engine.route("parallel", priority=10, declines=_one_step)
@in_accumulation_dtype
def _parallel(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_value_decay: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    time = queries.shape[1]
    state = zero_state(queries, keys, values) if state is None else state
    length = chunk_length(chunk_size, time)
    if log_decay is None:
        log_decay = torch.zeros_like(queries[..., 0])
    q, k, v = cut(queries, length), cut(keys, length), cut(values, length)
    by_key = _cut_decay(log_decay.unsqueeze(-1) if log_decay.ndim == 3 else log_decay, length)
    by_value = _cut_decay(log_value_decay, length)
    enters, leaves = by_key.cumsum(-2).exp(), _rest(by_key).exp()
    value_enters = by_value.cumsum(-2).exp()
    carried = enters[..., -1:, :].mT * value_enters[..., -1:, :]
    segment = None
    if reset is not None:
        # The masks travel with the decay of the keys: once in a product is enough.
        segment = cut(reset.to(q.dtype)[..., None, None], length).cumsum(-2)
        first, final = segment == 0, segment == segment[..., -1:, :]
        enters, leaves, carried = enters * first, leaves * final, carried * first[..., -1:, :]
    entering, last = chunk_states(carried, (k * leaves).mT @ (v * _rest(by_value).exp()), state)
    old = ((q * enters) @ entering) * value_enters
    return join(old + _within_chunks(q, k, v, by_key, by_value, segment), time), last


def _cut_decay(log_decay: Tensor, length: int) -> Tensor:
    """Log-decays in chunks; −∞ becomes what e to the power of is 0 in this type, so that sums stay finite."""
    return cut(log_decay.clamp(min=2 * math.log(torch.finfo(log_decay.dtype).tiny)), length)


def _rest(log_decay: Tensor) -> Tensor:
    """What comes after each token, to the end of the axis before the last: Σ_{s > t} g_s, a sum, not a difference."""
    return F.pad(log_decay[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _within_chunks(
    q: Float[Tensor, "chunks batch heads length key_dim"],
    k: Float[Tensor, "chunks batch heads length key_dim"],
    v: Float[Tensor, "chunks batch heads length value_dim"],
    key_decay: Float[Tensor, "chunks batch heads length channels"],
    value_decay: Float[Tensor, "chunks batch heads length value_dim"],
    segment: Float[Tensor, "chunks batch 1 length 1"] | None,
) -> Float[Tensor, "chunks batch heads length value_dim"]:
    """What the tokens of a chunk read of each other: Σ_{j ≤ i} Σ_c q_ic k_jc (B_ic / B_jc) (D_i ⊘ D_j) ⊙ v_j.

    The diagonal first, then the squares of late rows and early columns in all blocks of 2, 4, 8, … tokens.
    """
    outputs = (q * k).sum(-1, keepdim=True) * v
    length, size = q.shape[-2], 1
    while size < length:
        early_key, late_key = _to_middle(key_decay, size)
        early_value, late_value = _to_middle(value_decay, size)
        if segment is not None:
            early, late = segment.unflatten(-2, (-1, 2, size)).unbind(-3)
            middle = early[..., -1:, :]
            early_key, late_key = early_key * (early == middle), late_key * (late == middle)
        read = q.unflatten(-2, (-1, 2, size))[..., 1, :, :] * late_key
        write = k.unflatten(-2, (-1, 2, size))[..., 0, :, :] * early_key
        seen = v.unflatten(-2, (-1, 2, size))[..., 0, :, :] * early_value
        found = ((read @ write.mT) @ seen) * late_value
        outputs = outputs + torch.stack([torch.zeros_like(found), found], dim=-3).flatten(-4, -2)
        size *= 2
    return outputs


def _to_middle(log_decay: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Of the halves of each block of 2 · size tokens, exp(G_R − G_j) for the early and exp(G_i − G_R) for the late.

    (…, length, channels) -> twice (…, blocks, size, channels); R is the last early token.
    """
    early, late = log_decay.unflatten(-2, (-1, 2, size)).unbind(-3)
    return _rest(early).exp(), late.cumsum(-2).exp()


def outer_gated_attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    log_value_decay: Float[Tensor, "batch time heads value_dim"],
    log_decay: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key_dim"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    chunk_size: int = 64,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """All reads y_t = S_tᵀ q_t of the memory S_t = (exp(g_t) exp(e_t)ᵀ) ⊙ S_{t-1} + k_t v_tᵀ.

    Args:
        queries, keys: q and k. Nothing is scaled or normalised here.
        values: v.
        log_value_decay: e ≤ 0, one number per value channel.
        log_decay: g ≤ 0: None (no decay of the keys), one number per head, or one per key channel.
        state: S_0; zeros if None.
        reset: True marks the first step of a new sequence: there S_{t-1} counts as zero.
        chunk_size: how many tokens the parallel route takes at once, rounded up to a power of two. It changes the
            speed, not the result.
        validate: look for NaN and infinity in the arguments first (costs a pass over them).

    Returns:
        The outputs in the type of `queries`, and the last state. Half precision is computed, and its state kept, in
        float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: a chunk size below 1.
        NonFiniteError: with `validate`.

    Source: GLA (arXiv 2312.06635), section 4: the general form of the gate.
    """
    check_matrix_arguments(queries, keys, values, log_decay, state, reset)
    check_sequence("log_value_decay", log_value_decay, "batch time heads value_dim")
    check_shape("log_value_decay", log_value_decay, tuple(values.shape), "batch time heads value_dim, as values")
    check_chunk_size(chunk_size)
    if validate:
        check_finite(
            queries=queries,
            keys=keys,
            values=values,
            log_value_decay=log_value_decay,
            log_decay=log_decay,
            state=state,
        )
    outputs, last = _engine(queries, keys, values, log_value_decay, log_decay, state, reset, chunk_size)
    return outputs.to(queries.dtype), last
