"""`taylor_attention`: linear attention with the second-order Taylor features of exp(q·k / √f).

    φ(x) = [1, x / f^{1/4}, vec(x xᵀ) / (√2 √f)],     φ(q)·φ(k) = 1 + s + s²/2   with   s = q·k / √f
    S_t = S_{t-1} + φ(k_t) v_tᵀ,     y_t = S_tᵀ φ(q_t)

1 + s + s²/2 = ((1 + s)² + 1) / 2 is at least ½, so a normaliser made of it is never 0. The features are many more
numbers than what they are made of. In chunks they are written as seldom as can be: inside a chunk the polynomial is
taken of s itself, a product of f numbers, and the three orders of the state are read one by one.

Source: Based (arXiv 2402.18668), section 3; Just read twice (arXiv 2407.05483), appendix.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ostinato.errors import ConfigurationError
from ostinato.ops.checks import accumulation_dtype, check_reset, check_sequence, check_shape, in_accumulation_dtype
from ostinato.ops.chunks import check_chunk_size, chunk_length, cut, join
from ostinato.ops.linear_attention import linear_attention, linear_attention_step
from ostinato.ops.routes import Engine

_engine = Engine("taylor_attention")


def taylor_width(dim: int) -> int:
    """1 + f + f²: how many features there are of f numbers. Raises `ConfigurationError` for f below 1."""
    if dim < 1:
        raise ConfigurationError(f"Taylor features need at least one number, got dim {dim}")
    return 1 + dim + dim * dim


def taylor_features(x: Float[Tensor, "... dim"]) -> Float[Tensor, "... features"]:
    """φ(x); the square is whole, not its triangle. Half precision comes out in float32."""
    wide = x.to(accumulation_dtype(x.dtype))
    linear, square = _orders(wide)
    return torch.cat([torch.ones_like(wide[..., :1]), linear, square], dim=-1)


def _orders(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / f^{1/4}, and vec(x xᵀ) / (√2 √f)."""
    dim = x.shape[-1]
    root = x / (2 * dim) ** 0.25
    return x / dim**0.25, (root.unsqueeze(-1) * root.unsqueeze(-2)).flatten(-2)


def taylor_memory(
    keys: Float[Tensor, "batch time heads dim"], values: Float[Tensor, "batch time heads value_dim"]
) -> Float[Tensor, "batch heads features value_dim"]:
    """Σ_t φ(k_t) v_tᵀ: what a whole sequence leaves, in float32 for half precision.

    Raises `ShapeError`, `DtypeError` for arguments that do not fit together.
    """
    _check(keys, keys, values)
    wide = accumulation_dtype(keys.dtype)
    return _memory(keys.to(wide).transpose(1, 2), values.to(wide).transpose(1, 2))


def _memory(keys: Tensor, values: Tensor) -> Tensor:
    """Of (…, time, dim) and (…, time, value_dim)."""
    linear, square = _orders(keys)
    return torch.cat([values.sum(-2, keepdim=True), linear.mT @ values, square.mT @ values], dim=-2)


@_engine.route("reference")
@in_accumulation_dtype
def _reference(
    queries: Tensor, keys: Tensor, values: Tensor, state: Tensor | None, reset: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    state = _zero_state(queries, values) if state is None else state
    read, written = taylor_features(queries), taylor_features(keys)
    outputs = []
    for t in range(queries.shape[1]):
        if reset is not None:
            state = state.masked_fill(reset[:, t].view(-1, 1, 1, 1), 0)
        output, state = linear_attention_step(read[:, t], written[:, t], values[:, t], None, state)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def _one_step(queries: Tensor, *_: object) -> str | None:
    return "a single step needs no chunks" if queries.shape[1] == 1 else None


@_engine.route("parallel", priority=10, declines=_one_step)
@in_accumulation_dtype
def _parallel(
    queries: Tensor, keys: Tensor, values: Tensor, state: Tensor | None, reset: Tensor | None, chunk_size: int
) -> tuple[Tensor, Tensor]:
    if reset is not None:  # segments inside chunks are the general engine's
        return linear_attention(taylor_features(queries), taylor_features(keys), values, None, state, reset=reset)
    time, dim = queries.shape[1], queries.shape[-1]
    state = _zero_state(queries, values) if state is None else state
    length = chunk_length(chunk_size, time)
    # What fills the last chunk up has values of 0: nothing is written there.
    q, k, v = (cut(part, length) for part in (queries, keys, values))
    memories = torch.cat([state.unsqueeze(0), _memory(k, v)]).cumsum(0)
    constant, first, second = memories[:-1].split([1, dim, dim * dim], dim=-2)
    linear, square = _orders(q)
    half = torch.full((), 0.5, dtype=q.dtype, device=q.device)
    shifted = torch.baddbmm(
        torch.ones((), dtype=q.dtype, device=q.device), q.flatten(0, 2), k.flatten(0, 2).mT, alpha=1 / math.sqrt(dim)
    )
    inside = torch.addcmul(half, shifted, shifted, value=0.5).tril().view(*q.shape[:-1], length)
    outputs = inside @ v + linear @ first + square @ second + constant
    return join(outputs, time), memories[-1]


def _zero_state(queries: Tensor, values: Tensor) -> Tensor:
    batch, _, heads, dim = queries.shape
    return queries.new_zeros(batch, heads, taylor_width(dim), values.shape[-1])


def _check(queries: Tensor, keys: Tensor, values: Tensor) -> None:
    check_sequence("queries", queries, "batch time heads dim")
    check_sequence("keys", keys, "batch time heads dim")
    check_sequence("values", values, "batch time heads value_dim")
    check_shape("keys", keys, tuple(queries.shape), "batch time heads dim, as queries")
    check_shape("values", values, (*queries.shape[:3], values.shape[-1]), "batch time heads value_dim, as keys")


def taylor_attention(
    queries: Float[Tensor, "batch time heads dim"],
    keys: Float[Tensor, "batch time heads dim"],
    values: Float[Tensor, "batch time heads value_dim"],
    state: Float[Tensor, "batch heads features value_dim"] | None = None,
    *,
    reset: Bool[Tensor, "batch time"] | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Tensor, "batch time heads value_dim"], Float[Tensor, "batch heads features value_dim"]]:
    """All reads y_t = S_tᵀ φ(q_t) of S_t = S_{t-1} + φ(k_t) v_tᵀ: `linear_attention` of the features.

    Args:
        queries, keys: q and k, of f numbers.
        values: v; a channel of ones gives the normaliser, a step of zeros writes nothing.
        state: S_0; zeros if None.
        reset: True marks the first step of a new sequence: there S_{t-1} counts as zero.
        chunk_size: how many tokens the parallel route takes at once, rounded up to a power of two; None takes the
            one near √(features · value_dim), at which scores and states are about as many numbers.

    Returns:
        The outputs in the type of `queries`, and the last state. Half precision is computed, and its state
        kept, in float32.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: a chunk size below 1.
    """
    _check(queries, keys, values)
    check_reset(reset, queries.shape[0], queries.shape[1])
    features = taylor_width(queries.shape[-1])
    if chunk_size is None:
        chunk_size = 2 ** round(math.log2(features * values.shape[-1]) / 2)
    check_chunk_size(chunk_size)
    if state is not None:
        shape = (queries.shape[0], queries.shape[2], features, values.shape[-1])
        check_shape("state", state, shape, "batch heads features value_dim")
    outputs, last = _engine(queries, keys, values, state, reset, chunk_size)
    return outputs.to(queries.dtype), last
