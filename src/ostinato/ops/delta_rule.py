"""`delta_rule`: a memory that replaces what it held under a key, instead of adding to it.

    S' = exp(g_t) S_{t-1};   for j = 1 … n:   S' ← S' − β_j e_j (r_jᵀ S') + β_j k_j v_jᵀ;   S_t = S',   y_t = S_tᵀ q_t

r is what is looked up before it is erased, e where it is erased, k where the new value is written. In the
common case all three are the key, and each step multiplies the state by I − β k kᵀ: a reflection for β = 2. The
engine of DeltaNet, Gated DeltaNet, DeltaProduct (n steps a token), Kimi Delta Attention (decay per channel)
and RWKV-7 (r = κ exp(−g), e = κ ⊙ a, no β).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.ops.checks import accumulation_dtype, check_finite, check_sequence, check_shape, in_accumulation_dtype
from ostinato.ops.chunk_states import corrected_states
from ostinato.ops.chunks import (
    ChunkDecay,
    check_chunk_size,
    chunk_decay,
    chunk_length,
    cut,
    join,
    scaled,
)
from ostinato.ops.linear_attention import check_matrix_arguments, decay_factor
from ostinato.ops.routes import Engine

_engine = Engine("delta_rule")


def unit_length(x: Float[Tensor, "... dim"], eps: float = 1e-6) -> Float[Tensor, "... dim"]:
    """x / √(Σx² + eps) over the last axis, in float32 at least; an all-zero vector stays zero."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def _start(queries: Tensor, keys: Tensor, values: Tensor, state: Tensor | None, normalize: bool) -> tuple[Tensor, ...]:
    """Queries and keys, of unit length with `normalize`, and the initial state: zeros where none is given."""
    if normalize:
        queries, keys = unit_length(queries), unit_length(keys)
    if state is None:
        state = queries.new_zeros(queries.shape[0], *queries.shape[2:], values.shape[-1])
    return queries, keys, state


def delta_rule_step(
    query: Float[Tensor, "batch heads key_dim"],
    keys: Float[Tensor, "batch micro heads key_dim"],
    values: Float[Tensor, "batch micro heads value_dim"],
    beta: Float[Tensor, "batch micro heads"] | None,
    log_decay: Float[Tensor, "batch heads"] | Float[Tensor, "batch heads key_dim"] | None,
    state: Float[Tensor, "batch heads key_dim value_dim"],
    read_keys: Float[Tensor, "batch micro heads key_dim"] | None = None,
    erase_keys: Float[Tensor, "batch micro heads key_dim"] | None = None,
) -> tuple[Float[Tensor, "batch heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """One step, the definition at the head of this file. Returns y and S."""
    if log_decay is not None:
        state = state * decay_factor(log_decay)
    for j in range(keys.shape[1]):
        key, value = keys[:, j], values[:, j]
        read = key if read_keys is None else read_keys[:, j]
        erase = key if erase_keys is None else erase_keys[:, j]
        removed = (read.unsqueeze(-2) @ state).squeeze(-2)
        if beta is not None:
            rate = beta[:, j].unsqueeze(-1)
            removed, value = rate * removed, rate * value
        state = state - erase.unsqueeze(-1) * removed.unsqueeze(-2) + key.unsqueeze(-1) * value.unsqueeze(-2)
    return (query.unsqueeze(-2) @ state).squeeze(-2), state


@_engine.route("reference")
@in_accumulation_dtype
def _reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    read_keys: Tensor | None,
    erase_keys: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    queries, keys, state = _start(queries, keys, values, state, normalize)
    time = queries.shape[1]
    micro = keys.shape[1] // time
    outputs = []
    for t in range(time):
        if reset is not None:
            state = state.masked_fill(reset[:, t].view(-1, 1, 1, 1), 0)
        steps = slice(t * micro, (t + 1) * micro)
        output, state = delta_rule_step(
            queries[:, t],
            keys[:, steps],
            values[:, steps],
            None if beta is None else beta[:, steps],
            None if log_decay is None else log_decay[:, t],
            state,
            None if read_keys is None else read_keys[:, steps],
            None if erase_keys is None else erase_keys[:, steps],
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
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    read_keys: Tensor | None,
    erase_keys: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
    normalize: bool,
) -> tuple[Tensor, Tensor]:
    queries, keys, state = _start(queries, keys, values, state, normalize)
    time = queries.shape[1]
    micro = keys.shape[1] // time
    # The triangular systems have one row for each step, so a token of n steps makes the chunk n times shorter.
    length = chunk_length(max(1, chunk_size // micro), time)
    decay = chunk_decay(log_decay, reset, length, queries.dtype)
    q, k, v = cut(queries, length), cut(keys, length, micro), cut(values, length, micro)
    rate = None if beta is None else cut(beta.unsqueeze(-1), length, micro)
    weighted = scaled(v, rate)
    if read_keys is None and erase_keys is None:
        outputs, last = _replace(q, k, weighted, rate, decay, state, micro)
    else:
        read = k if read_keys is None else cut(read_keys, length, micro)
        erase = k if erase_keys is None else cut(erase_keys, length, micro)
        outputs, last = _erase_and_write(q, k, weighted, read, erase, rate, decay, state, micro)
    return join(outputs, time), last


def _replace(
    q: Tensor, k: Tensor, weighted: Tensor, rate: Tensor | None, decay: ChunkDecay, state: Tensor, micro: int
) -> tuple[Tensor, Tensor]:
    """One key reads, erases and writes: the state gains k_i u_iᵀ, u_i = β_i (v_i − S'ᵀ k_i).

    With A_ij = β_i Σ_c k_ic k_jc exp(G_ic − G_jc), j < i, the u of a chunk solve (I + A) u = βv − β(k e^G) S, so
    they are u = U − W S with (I + A) [U, W] = [βv, β k e^G], and the state at the chunk's end is
    e^{G_C} S + k̂ᵀ u, with k̂ = k e^{G_C − G}: the only step that goes from chunk to chunk.
    """
    inverse = _unit_inverse(scaled(decay.scores(k, k, strict=True), rate))
    reading = scaled(k, decay.entering, micro)
    reading = -reading if rate is None else reading * -rate
    written, entering, last = corrected_states(
        decay.carried, inverse @ reading, inverse @ weighted, scaled(k, decay.leaving, micro), None, state
    )
    return decay.scores(q, k) @ written + scaled(q, decay.entering) @ entering, last


def _erase_and_write(
    q: Tensor,
    k: Tensor,
    weighted: Tensor,
    read: Tensor,
    erase: Tensor,
    rate: Tensor | None,
    decay: ChunkDecay,
    state: Tensor,
    micro: int,
) -> tuple[Tensor, Tensor]:
    """Keys of their own to read, to erase and to write: the state gains k_i β_i v_iᵀ − e_i z_iᵀ, z_i = β_i S'ᵀ r_i.

    With A = β scores(r, e) and B = β scores(r, k), both strictly lower, the z of a chunk solve
    (I + A) z = β(r e^G) S + B βv, so z = Z + W S; the state at the chunk's end is
    e^{G_C} S + k̂ᵀ βv − êᵀ z.
    """
    inverse = _unit_inverse(scaled(decay.scores(read, erase, strict=True), rate))
    stored = scaled(decay.scores(read, k, strict=True), rate) @ weighted
    reading = scaled(scaled(read, decay.entering, micro), rate)
    removed, entering, last = corrected_states(
        decay.carried,
        inverse @ reading,
        inverse @ stored,
        -scaled(erase, decay.leaving, micro),
        scaled(k, decay.leaving, micro).mT @ weighted,
        state,
    )
    outputs = decay.scores(q, k) @ weighted - decay.scores(q, erase) @ removed
    return outputs + scaled(q, decay.entering) @ entering, last


def _unit_inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ for strictly lower triangular L, by substitution: accurate however parallel the keys are."""
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand(lower.shape)
    return torch.linalg.solve_triangular(lower, identity, upper=False, unitriangular=True)


def delta_rule(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch steps heads key_dim"],
    values: Float[Tensor, "batch steps heads value_dim"],
    beta: Float[Tensor, "batch steps heads"] | None = None,
    log_decay: Float[Tensor, "batch time heads"] | Float[Tensor, "batch time heads key_dim"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    read_keys: Float[Tensor, "batch steps heads key_dim"] | None = None,
    erase_keys: Float[Tensor, "batch steps heads key_dim"] | None = None,
    reset: Bool[Tensor, "batch time"] | None = None,
    normalize: bool = False,
    chunk_size: int = 32,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """All reads y_t = S_tᵀ q_t of a memory updated by n delta steps a token (formula at the head of this file).

    Args:
        queries: q; read after all n steps of its token.
        keys: k; of length 1 (see `normalize`), or the state can grow without bound. n = steps of `keys` per
            query; the n steps of a token are neighbours in time.
        values: v.
        beta: β, 1 if None. Within [0, 2] each step has the eigenvalue 1 − β in [−1, 1] (for |k| = 1).
        log_decay: g ≤ 0, applied once a token, before its first step: None, one number per head, or one per
            key channel.
        state: S_0; zeros if None.
        read_keys: r, what is looked up to be erased; `keys` if None.
        erase_keys: e, where it is erased; `keys` if None.
        reset: True marks the first token of a new sequence: there S_{t-1} counts as zero.
        normalize: divide queries and keys by their length first, √(Σx² + 1e-6). Keys of their own to read and to
            erase are taken as they are.
        chunk_size: steps that the parallel route takes at once, rounded to a power of two: speed, not result.
        validate: look for NaN and infinity in the arguments first (costs a pass over them).

    Returns:
        The outputs in the type of `queries`, and the last state. Half precision is computed, and its state
        kept, in float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: a chunk size below 1.
        NonFiniteError: with `validate`.

    Source: Parallel DeltaNet (arXiv 2406.06484), section 3; Gated DeltaNet (arXiv 2412.06464); DeltaProduct (arXiv
    2502.10297), section 3; negative eigenvalues (arXiv 2411.12537).
    """
    check_matrix_arguments(queries, keys, values, log_decay, state, reset, several=True)
    if beta is not None:
        check_sequence("beta", beta, "batch time heads")
        check_shape("beta", beta, tuple(keys.shape[:3]), "batch time heads, as keys")
    for name, other in (("read_keys", read_keys), ("erase_keys", erase_keys)):
        if other is not None:
            check_sequence(name, other, "batch time heads key_dim")
            check_shape(name, other, tuple(keys.shape), "batch time heads key_dim, as keys")
    check_chunk_size(chunk_size)
    if validate:
        check_finite(queries=queries, keys=keys, values=values, beta=beta, log_decay=log_decay, state=state)
        check_finite(read_keys=read_keys, erase_keys=erase_keys)
    outputs, last = _engine(
        queries, keys, values, beta, log_decay, state, read_keys, erase_keys, reset, chunk_size, normalize
    )
    return outputs.to(queries.dtype), last
