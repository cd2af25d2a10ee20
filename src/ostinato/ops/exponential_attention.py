"""`exponential_attention`: linear attention whose input gate is an exponential (mLSTMexp).

    m_t = max(f_t + m_{t-1}, i_t),   f' = exp(f_t + m_{t-1} − m_t),   i' = exp(i_t − m_t)
    C_t = f' C_{t-1} + i' k_t v_tᵀ,   n_t = f' n_{t-1} + i' k_t
    h_t = C_tᵀ q_t / (max(|n_tᵀ q_t|, exp(−m_t)) + ε)

with f the logarithm of the forget gate and i the logarithm of the input gate, which may be large. The running
maximum m only keeps the exponentials small; it is a scan of its own (`MAX_PLUS`). Given m, what is left
is `linear_attention` with the log-decays f_t + m_{t-1} − m_t ≤ 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ConfigurationError, DtypeError
from ostinato.ops.checks import check_finite, check_sequence, check_shape, in_accumulation_dtype
from ostinato.ops.chunk_states import chunk_states
from ostinato.ops.chunks import check_chunk_size, chunk_decay, chunk_length, cut, join, scaled
from ostinato.ops.linear_attention import check_matrix_arguments, linear_attention_step
from ostinato.ops.routes import Engine
from ostinato.ops.scan import MAX_PLUS, associative_scan

_engine = Engine("exponential_attention")


class ExponentialState(NamedTuple):
    """The memory C, the normaliser n, and the running maximum m that both are divided by exp of."""

    memory: Float[Tensor, "batch heads key_dim value_dim"]
    normalizer: Float[Tensor, "batch heads key_dim"]
    maximum: Float[Tensor, "batch heads"]


def _normalized(numerator: Tensor, denominator: Tensor, maximum: Tensor, eps: float) -> Tensor:
    """num / (max(|den|, exp(−m)) + ε), without overflow for m ≪ 0.

    All terms are multiplied by exp(s), s = min(m, 0); the value does not depend on s, so s needs no gradient.
    """
    shift = maximum.detach().clamp(max=0)
    scale = torch.exp(shift)
    floor = torch.exp(shift - maximum)
    bound = torch.maximum(denominator.abs() * scale, floor) + eps * scale
    return numerator * (scale / bound).unsqueeze(-1)


def exponential_attention_step(
    query: Float[Tensor, "batch heads key_dim"],
    key: Float[Tensor, "batch heads key_dim"],
    value: Float[Tensor, "batch heads value_dim"],
    log_input: Float[Tensor, "batch heads"],
    log_forget: Float[Tensor, "batch heads"],
    state: ExponentialState,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "batch heads value_dim"], ExponentialState]:
    """One step, the definition at the head of this file. Returns h and the new state."""
    maximum = torch.maximum(log_forget + state.maximum, log_input)
    decay = log_forget + state.maximum - maximum
    written = key * torch.exp(log_input - maximum).unsqueeze(-1)
    numerator, memory = linear_attention_step(query, written, value, decay, state.memory)
    normalizer = state.normalizer * torch.exp(decay).unsqueeze(-1) + written
    denominator = (query * normalizer).sum(-1)
    return _normalized(numerator, denominator, maximum, eps), ExponentialState(memory, normalizer, maximum)


def _initial(queries: Tensor, values: Tensor) -> ExponentialState:
    """Zeros, the maximum too."""
    batch, _, heads, key_dim = queries.shape
    return ExponentialState(
        queries.new_zeros(batch, heads, key_dim, values.shape[-1]),
        queries.new_zeros(batch, heads, key_dim),
        queries.new_zeros(batch, heads),
    )


@_engine.route("reference")
@in_accumulation_dtype
def _reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    state: ExponentialState | None,
    reset: Tensor | None,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, ExponentialState]:
    state = _initial(queries, values) if state is None else state
    outputs = []
    for t in range(queries.shape[1]):
        if reset is not None:
            new = reset[:, t]
            state = ExponentialState(*(part.masked_fill(new.view(-1, *[1] * (part.ndim - 1)), 0) for part in state))
        output, state = exponential_attention_step(
            queries[:, t], keys[:, t], values[:, t], log_input[:, t], log_forget[:, t], state, eps
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
    log_input: Tensor,
    log_forget: Tensor,
    state: ExponentialState | None,
    reset: Tensor | None,
    chunk_size: int,
    eps: float,
) -> tuple[Tensor, ExponentialState]:
    state = _initial(queries, values) if state is None else state
    # Where little is forgotten, a running maximum in float32 loses digits of the decays at each of its steps.
    wide = queries.dtype if queries.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    forget, given, first = log_forget.to(wide), log_input.to(wide), state.maximum.to(wide)
    added, least = forget, given
    if reset is not None:
        # A map that forgets where it starts from: m -> max(−∞ + m, max(f + 0, i)).
        new = reset.unsqueeze(-1)
        added, least = forget.masked_fill(new, -torch.inf), torch.where(new, torch.maximum(forget, given), given)
    (exact,) = associative_scan(MAX_PLUS, (added, least), (first,))
    before = torch.cat([first.unsqueeze(1), exact[:, :-1]], dim=1)
    if reset is not None:
        before = before.masked_fill(reset.unsqueeze(-1), 0)
    decay = (forget + before - exact).to(queries.dtype)
    maximum, written = exact.to(queries.dtype), torch.exp(given - exact).to(queries.dtype)
    time = queries.shape[1]
    length = chunk_length(chunk_size, time)
    left = chunk_decay(decay, reset, length, queries.dtype)
    q, k, v = cut(queries, length), cut(keys, length), cut(values, length)
    gate = cut(written.unsqueeze(-1), length)
    kept, read = scaled(k, scaled(gate, left.leaving)), scaled(q, left.entering)
    memories, memory = chunk_states(left.carried, kept.mT @ v, state.memory)
    # The normaliser is a memory of values that are all 1.
    sums = kept.sum(-2).unsqueeze(-1)
    normalizers, normalizer = chunk_states(left.carried, sums, state.normalizer.unsqueeze(-1))
    scores = left.scores(q, k) * gate.mT
    numerator = join(scores @ v + read @ memories, time)
    denominator = join(scores.sum(-1, keepdim=True) + read @ normalizers, time).squeeze(-1)
    outputs = _normalized(numerator, denominator, maximum, eps)
    return outputs, ExponentialState(memory, normalizer.squeeze(-1), maximum[:, -1])


def exponential_attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch time heads key_dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    log_input: Float[Tensor, "batch time heads"],
    log_forget: Float[Tensor, "batch time heads"],
    state: ExponentialState | None = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    chunk_size: int = 64,
    eps: float = 1e-6,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time heads value_dim"], ExponentialState]:
    """Linear attention with an exponential input gate, a running maximum and a normaliser.

    Args:
        queries, keys, values: q (scaled by the caller), k and v.
        log_input: i, the pre-activation of the exponential input gate; any sign and size.
        log_forget: f ≤ 0, the logarithm of the forget gate: logsigmoid of its pre-activation.
        state: where to go on from; zeros (the maximum too) if None.
        reset: True marks the first step of a new sequence: there the state counts as zero.
        chunk_size: tokens per chunk of the parallel route, rounded up to a power of two: speed, not result.
        eps: what is added to the denominator.
        validate: look for NaN and infinity in the arguments first (costs a pass over them).

    Returns:
        h in the type of `queries`, and the last state. Half precision is computed, and its state kept, in
        float32. All derivatives are those of the formula, through m and n too.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: a chunk size below 1, a negative eps.
        NonFiniteError: with `validate`.

    Source: Tiled Flash Linear Attention (arXiv 2503.14376), section 2; xLSTM (arXiv 2405.04517), section 2.3.
    """
    memory = None
    if state is not None:
        if not (isinstance(state, tuple) and len(state) == 3):
            raise DtypeError(f"state must be an ExponentialState, got {type(state).__name__}")
        state = ExponentialState(*state)
        memory = state.memory
    check_matrix_arguments(queries, keys, values, None, memory, reset)
    batch, time, heads, key_dim = queries.shape
    for name, gate in (("log_input", log_input), ("log_forget", log_forget)):
        check_sequence(name, gate, "batch time heads")
        check_shape(name, gate, (batch, time, heads), "batch time heads")
    if state is not None:
        check_shape("state.normalizer", state[1], (batch, heads, key_dim), "batch heads key_dim")
        check_shape("state.maximum", state[2], (batch, heads), "batch heads")
    check_chunk_size(chunk_size)
    if eps < 0:
        raise ConfigurationError(f"eps must not be negative, got {eps}")
    if validate:
        check_finite(queries=queries, keys=keys, values=values, log_input=log_input, log_forget=log_forget)
        if state is not None:
            check_finite(memory=state[0], normalizer=state[1], maximum=state[2])
    outputs, last = _engine(queries, keys, values, log_input, log_forget, state, reset, chunk_size, eps)
    return outputs.to(queries.dtype), last
