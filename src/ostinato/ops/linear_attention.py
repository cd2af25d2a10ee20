"""`linear_attention`: S_t = Λ_t S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t.

An associative memory of key–value products that forgets by nothing, by one factor per head, or by one factor
per key channel. The engine of linear attention, RetNet, GLA, HGRN2, Mamba-2 and mLSTM with sigmoid gates (whose
input gate is a factor on the keys).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ShapeError
from ostinato.ops.checks import (
    accumulation_dtype,
    check_finite,
    check_reset,
    check_sequence,
    check_shape,
    in_accumulation_dtype,
)
from ostinato.ops.chunk_states import chunk_states
from ostinato.ops.chunks import check_chunk_size, chunk_decay, chunk_length, cut, join, scaled
from ostinato.ops.routes import Engine

_engine = Engine("linear_attention")


def linear_attention_step(
    query: Float[Tensor, "batch heads key_dim"],
    key: Float[Tensor, "batch heads key_dim"],
    value: Float[Tensor, "batch heads value_dim"],
    log_decay: Float[Tensor, "batch heads"] | Float[Tensor, "batch heads key_dim"] | None,
    state: Float[Tensor, "batch heads key_dim value_dim"],
) -> tuple[Float[Tensor, "batch heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """One step, the definition: S = exp(g) S' + k vᵀ, y = Sᵀ q. Returns y and S."""
    if log_decay is not None:
        state = state * decay_factor(log_decay)
    state = state + key.unsqueeze(-1) * value.unsqueeze(-2)
    return (query.unsqueeze(-2) @ state).squeeze(-2), state


def decay_factor(log_decay: Tensor) -> Tensor:
    """exp(g) shaped to multiply a state: (batch, heads[, key_dim]) -> (batch, heads, 1 or key_dim, 1)."""
    factor = torch.exp(log_decay)
    return factor.unsqueeze(-1) if factor.ndim == 3 else factor.unsqueeze(-1).unsqueeze(-1)


def zero_state(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """The state before the first step where none is passed, in the type that states are kept in."""
    batch, _, heads, key_dim = keys.shape
    return queries.new_zeros(batch, heads, key_dim, values.shape[-1], dtype=accumulation_dtype(queries.dtype))


@_engine.route("reference")
@in_accumulation_dtype
def _reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
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
        output, state = linear_attention_step(queries[:, t], keys[:, t], values[:, t], decay, state)
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
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    time = queries.shape[1]
    state = zero_state(queries, keys, values) if state is None else state
    length = chunk_length(chunk_size, time)
    decay = chunk_decay(log_decay, reset, length, queries.dtype)
    q, k, v = cut(queries, length), cut(keys, length), cut(values, length)
    entering, last = chunk_states(decay.carried, scaled(k, decay.leaving).mT @ v, state)
    outputs = decay.scores(q, k) @ v + scaled(q, decay.entering) @ entering
    return join(outputs, time), last


def check_matrix_arguments(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    *,
    several: bool = False,
) -> None:
    """Raise unless queries, keys, values, log-decays, state and reset fit together.

    With `several`, keys and values may have any multiple of the queries' steps.
    """
    check_sequence("queries", queries, "batch time heads key_dim")
    check_sequence("keys", keys, "batch time heads key_dim")
    check_sequence("values", values, "batch time heads value_dim")
    batch, time, heads, key_dim = queries.shape
    steps, value_dim = keys.shape[1] if several else time, values.shape[-1]
    check_shape("keys", keys, (batch, steps, heads, key_dim), "batch time heads key_dim, as queries")
    if steps % time:
        raise ShapeError(f"keys have {steps} steps for {time} queries; they must be a multiple (n steps a token)")
    check_shape("values", values, (batch, steps, heads, value_dim), "batch time heads value_dim, as keys")
    if log_decay is not None:
        axes = "batch time heads" + (" key_dim" if log_decay.ndim == 4 else "")
        check_sequence("log_decay", log_decay, axes)
        check_shape("log_decay", log_decay, tuple(queries.shape[: log_decay.ndim]), axes)
    if state is not None:
        check_shape("state", state, (batch, heads, key_dim, value_dim), "batch heads key_dim value_dim")
    check_reset(reset, batch, time)


def linear_attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    log_decay: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key_dim"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    chunk_size: int = 64,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """All reads y_t = S_tᵀ q_t of the memory S_t = exp(g_t) S_{t-1} + k_t v_tᵀ.

    Args:
        queries, keys: q and k. Nothing is scaled or normalised here.
        values: v.
        log_decay: g ≤ 0: None (no decay), one number per head, or one per key channel.
        state: S_0; zeros if None.
        reset: True marks the first step of a new sequence: there S_{t-1} counts as zero.
        chunk_size: how many tokens the parallel route takes at once, rounded up to a power of two. It changes
            the speed, not the result.
        validate: look for NaN and infinity in the arguments first (costs a pass over them).

    Returns:
        The outputs in the type of `queries`, and the last state. Half precision is computed, and its state
        kept, in float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: a chunk size below 1.
        NonFiniteError: with `validate`.

    Source: GLA (arXiv 2312.06635), section 4; RetNet (arXiv 2307.08621) and Mamba-2 (arXiv 2405.21060) for the
    scalar decay.
    """
    check_matrix_arguments(queries, keys, values, log_decay, state, reset)
    check_chunk_size(chunk_size)
    if validate:
        check_finite(queries=queries, keys=keys, values=values, log_decay=log_decay, state=state)
    outputs, last = _engine(queries, keys, values, log_decay, state, reset, chunk_size)
    return outputs.to(queries.dtype), last
