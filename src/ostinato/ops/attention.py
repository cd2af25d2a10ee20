"""`attention`: causal softmax attention, the yardstick: its state is a cache that grows, or a sliding window.

    y_t = Σ_{j ≤ t} w_tj m_{t−j} v_j,    w_t = softmax_j(q_t · k_j / √d + b_{t−j})

It is open at three places: `bias` b is added to the scores (ALiBi, relative position embeddings), `weight`
stands in for softmax (softplus attention with re-weighting), `multiplier` m comes after it (URPE attention).
Bias and multiplier are functions of the distance t − j, so they mean the same in a long sequence, in pieces of
it, and step by step; a weight function sees one whole row of scores at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ostinato.errors import ConfigurationError, DtypeError, ShapeError
from ostinato.ops.attention_blocks import AttendBlock, attend_by_blocks, under_torch_func
from ostinato.ops.checks import HALF, check_finite, check_reset, check_sequence, check_shape
from ostinato.ops.routes import Engine

_engine = Engine("attention")

Opening = Tensor | Callable[[Tensor], Tensor]
"""A table (heads, reach) by distance, or a function from distances (n,) to such a table (heads, n).

One head stands for all. Distances beyond a given table take its last column.
"""

Weight = Callable[[Tensor, Tensor], Tensor]
"""weight(scores, visible) -> weights, all (batch, heads, queries, keys), `visible` bool and broadcastable.

It works on rows: a row's weights depend on that row's visible scores only. What it gives to an invisible
place is ignored.
"""


class AttentionState(NamedTuple):
    """The keys and values of the steps so far, oldest first; all of them, or the last window − 1."""

    keys: Float[Tensor, "batch cached kv_heads key_dim"]
    values: Float[Tensor, "batch cached kv_heads value_dim"]
    valid: Bool[Tensor, "batch cached"]
    """False where there is nothing (before the first step, or from before a reset); keys and values are 0 there."""


def empty_cache(
    batch: int,
    kv_heads: int,
    key_dim: int,
    value_dim: int,
    window: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> AttentionState:
    """The state before the first step: no entries, or window − 1 that are not valid."""
    cached = 0 if window is None else window - 1
    return AttentionState(
        torch.zeros(batch, cached, kv_heads, key_dim, dtype=dtype, device=device),
        torch.zeros(batch, cached, kv_heads, value_dim, dtype=dtype, device=device),
        torch.zeros(batch, cached, dtype=torch.bool, device=device),
    )


def softmax_weight(scores: Float[Tensor, "*axes keys"], visible: Bool[Tensor, "*#axes keys"]) -> Tensor:
    """Softmax over the visible keys; a row that sees nothing gets zeros, and zero gradients."""
    # The lowest finite number, not −∞: a row of −∞ would be NaN, also where it is masked afterwards.
    masked = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return masked.softmax(-1).masked_fill(~visible, 0)


def attend(
    queries: Float[Tensor, "batch heads queries key_dim"],
    keys: Float[Tensor, "batch kv_heads keys key_dim"],
    values: Float[Tensor, "batch kv_heads keys value_dim"],
    visible: Bool[Tensor, "#batch 1 queries keys"],
    distance: Int[Tensor, "queries keys"],
    scale: float,
    bias: Float[Tensor, "#heads reach"] | None = None,
    weight: Weight | None = None,
    multiplier: Float[Tensor, "#heads reach"] | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """The definition for any queries and keys: weights out of scores, outputs out of weights.

    Heads are axis 1 here. Half precision is computed in float32.
    """
    dtype = queries.dtype
    if dtype in HALF:
        queries, keys, values = queries.float(), keys.float(), values.float()
    # Query heads stand in groups, each of which shares one head of keys and values.
    groups = (keys.shape[1], queries.shape[1] // keys.shape[1])
    scores = (queries * scale).unflatten(1, groups) @ keys.transpose(-1, -2).unsqueeze(2)
    scores = scores.flatten(1, 2)
    if bias is not None:
        scores = scores + _by_distance(bias, distance)
    weights = softmax_weight(scores, visible) if weight is None else weight(scores, visible).masked_fill(~visible, 0)
    if multiplier is not None:
        weights = weights * _by_distance(multiplier, distance)
    return (weights.unflatten(1, groups) @ values.unsqueeze(2)).flatten(1, 2).to(dtype)


def _by_distance(table: Tensor, distance: Tensor) -> Tensor:
    return table[:, distance.clamp(0, table.shape[1] - 1)]


def attention_step(
    queries: Float[Tensor, "batch heads key_dim"],
    keys: Float[Tensor, "batch kv_heads key_dim"],
    values: Float[Tensor, "batch kv_heads value_dim"],
    state: AttentionState,
    *,
    window: int | None = None,
    scale: float | None = None,
    bias: Float[Tensor, "#heads reach"] | None = None,
    weight: Weight | None = None,
    multiplier: Float[Tensor, "#heads reach"] | None = None,
) -> tuple[Float[Tensor, "batch heads value_dim"], AttentionState]:
    """One step, the definition: put the new key and value into the cache, look at the cache, drop the oldest."""
    all_keys = torch.cat([state.keys, keys.unsqueeze(1)], dim=1)
    all_values = torch.cat([state.values, values.unsqueeze(1)], dim=1)
    valid = torch.cat([state.valid, state.valid.new_ones(state.valid.shape[0], 1)], dim=1)
    distance = torch.arange(valid.shape[1] - 1, -1, -1, device=valid.device).unsqueeze(0)
    outputs = attend(
        queries.unsqueeze(2),
        all_keys.transpose(1, 2).to(queries.dtype),
        all_values.transpose(1, 2).to(queries.dtype),
        valid[:, None, None, :],
        distance,
        queries.shape[-1] ** -0.5 if scale is None else scale,
        bias,
        weight,
        multiplier,
    )
    return outputs.squeeze(2), _leaving(all_keys, all_values, valid, window)


def _leaving(keys: Tensor, values: Tensor, valid: Tensor, window: int | None) -> AttentionState:
    """The state out of all entries: the last window − 1, zero where they are not valid."""
    if window is not None:
        drop = valid.shape[1] - (window - 1)
        keys, values, valid = keys[:, drop:], values[:, drop:], valid[:, drop:]
    gone = ~valid[:, :, None, None]
    # masked_fill copies: a view of the last entries would keep the whole sequence in memory.
    return AttentionState(keys.masked_fill(gone, 0), values.masked_fill(gone, 0), valid.clone())


@_engine.route("reference")
def _reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: AttentionState,
    reset: Tensor | None,
    window: int | None,
    scale: float,
    bias: Tensor | None,
    weight: Weight | None,
    multiplier: Tensor | None,
) -> tuple[Tensor, AttentionState]:
    outputs = []
    for t in range(queries.shape[1]):
        if reset is not None:
            state = _leaving(state.keys, state.values, state.valid & ~reset[:, t, None], None)
        output, state = attention_step(
            queries[:, t],
            keys[:, t],
            values[:, t],
            state,
            window=window,
            scale=scale,
            bias=bias,
            weight=weight,
            multiplier=multiplier,
        )
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


def _one_step(queries: Tensor, *_: Any) -> str | None:
    return "a single step is a single step" if queries.shape[1] == 1 else None


@_engine.route("parallel", priority=10, declines=_one_step)
def _parallel(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: AttentionState,
    reset: Tensor | None,
    window: int | None,
    scale: float,
    bias: Tensor | None,
    weight: Weight | None,
    multiplier: Tensor | None,
) -> tuple[Tensor, AttentionState]:
    def explicit(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, distance: Tensor) -> Tensor:
        return attend(q, k, v, visible, distance, scale, bias, weight, multiplier)

    return _by_blocks(explicit, queries, keys, values, state, reset, window)


def _not_fused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: AttentionState,
    reset: Tensor | None,
    window: int | None,
    scale: float,
    bias: Tensor | None,
    weight: Weight | None,
    multiplier: Tensor | None,
) -> str | None:
    if bias is not None or weight is not None or multiplier is not None:
        return "torch's kernel has no bias, weight or multiplier of ours"
    if queries.dtype == torch.float64:
        return "float64 is computed exactly, and twice differentiable, by the parallel route"
    if under_torch_func():
        return "torch.func has no rule for torch's kernel"
    return None


@_engine.route("fused", priority=15, refuses=_not_fused, declines=_one_step)
def _fused(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: AttentionState,
    reset: Tensor | None,
    window: int | None,
    scale: float,
    *_: Any,
) -> tuple[Tensor, AttentionState]:
    # torch's own kernel, whichever it has for the device. It raises when it is differentiated twice.
    grouped = queries.shape[2] != keys.shape[2]

    def kernel(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, distance: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, scale=scale, enable_gqa=grouped
        )

    if reset is None and window is None and state.valid.shape[1] == 0:
        q, k, v = (x.transpose(1, 2) for x in (queries, keys, values))
        valid = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
        outputs = kernel(q, k.to(q.dtype), v.to(q.dtype), None, None).transpose(1, 2)
        return outputs, _leaving(torch.cat([state.keys, keys], 1), torch.cat([state.values, values], 1), valid, None)
    return _by_blocks(kernel, queries, keys, values, state, reset, window)


def _by_blocks(
    attend_block: AttendBlock,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: AttentionState,
    reset: Tensor | None,
    window: int | None,
) -> tuple[Tensor, AttentionState]:
    """Outputs and state, block of queries by block of queries.

    Every entry carries the number of its sequence (−1: nothing there); a query sees its own sequence only.
    """
    all_keys = torch.cat([state.keys, keys], dim=1)
    all_values = torch.cat([state.values, values], dim=1)
    first = torch.zeros(queries.shape[:2], dtype=torch.long, device=keys.device)
    sequence = torch.cat([torch.where(state.valid, 0, -1), first if reset is None else reset.cumsum(1)], dim=1)
    outputs = attend_by_blocks(attend_block, queries, all_keys, all_values, sequence, window)
    return outputs, _leaving(all_keys, all_values, sequence == sequence[:, -1:], window)


def attention(
    queries: Float[Tensor, "batch time heads key_dim"],
    keys: Float[Tensor, "batch time kv_heads key_dim"],
    values: Float[Tensor, "batch time kv_heads value_dim"],
    state: AttentionState | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    bias: Opening | None = None,
    weight: Weight | None = None,
    multiplier: Opening | None = None,
    reset: Bool[Tensor, "batch time"] | None = None,
    validate: bool = False,
) -> tuple[Float[Tensor, "batch time heads value_dim"], AttentionState]:
    """Causal attention: y_t = Σ_{j ≤ t} w_tj m_{t−j} v_j, w_t = softmax_j(scale · q_t · k_j + b_{t−j}).

    Args:
        queries: q.
        keys, values: k, v; their heads may be fewer than the queries' and divide them (grouped queries).
        state: the cache of the steps before; None starts anew.
        window: see the last `window` steps only, one's own among them. The state then has window − 1 entries,
            however long the sequence; without a window it grows by one a step.
        scale: what scores are multiplied by; None is 1/√key_dim.
        bias: b, added to the scores: a table (heads or 1, reach) whose column d is for distance d = t − j
            (beyond the table: its last column), or a function from distances (n,) to such a table (heads or 1, n).
        weight: in place of softmax: weight(scores, visible) -> weights, (batch, heads, queries, keys) all of
            them; each row by itself. Default: `softmax_weight`.
        multiplier: m, on the weights, given as `bias` is. Nothing is normalised after it.
        reset: True marks the first step of a new sequence: nothing from before it is seen. (Without a window
            its entries stay in the state, zero and not valid, because the rows of a batch reset at different times.)
        validate: look for NaN and infinity in the arguments first (costs a pass over them).

    Returns:
        The outputs in the type of `queries` (half precision is computed in float32), and the cache, in the type
        of keys and values: it is a copy of them, nothing is accumulated in it.

    Raises:
        ShapeError, DtypeError: arguments that do not fit together.
        ConfigurationError: a window below 1.
        NonFiniteError: with `validate`.

    The route `fused` (float32 and half precision, no openings) is torch's scaled_dot_product_attention, which
    cannot be differentiated twice and says so; `with ostinato.backend(attention="parallel")` can.
    Memory is linear in time on `parallel` and `fused` (work is not, without a window).

    Source: Attention Is All You Need (arXiv 1706.03762), section 3.2; grouped queries: arXiv 2305.13245;
    sliding window: Longformer (arXiv 2004.05150); multiplier: URPE (arXiv 2205.13401); weight: arXiv 2501.13428.
    """
    check_sequence("queries", queries, "batch time heads key_dim")
    check_sequence("keys", keys, "batch time kv_heads key_dim")
    check_sequence("values", values, "batch time kv_heads value_dim")
    batch, time, heads, key_dim = queries.shape
    kv_heads, value_dim = values.shape[2:]
    check_shape("keys", keys, (batch, time, kv_heads, key_dim), "batch time kv_heads key_dim")
    check_shape("values", values, (batch, time, kv_heads, value_dim), "batch time kv_heads value_dim")
    if heads % kv_heads:
        raise ShapeError(f"{heads} heads of queries cannot share {kv_heads} heads of keys and values evenly")
    for name, tensor in (("queries", queries), ("keys", keys), ("values", values)):
        if tensor.is_complex():
            raise DtypeError(f"{name} must be real, got {tensor.dtype}")
    check_reset(reset, batch, time)
    if window is not None and window < 1:
        raise ConfigurationError(f"a window holds at least the step itself, got {window}; None sees everything")
    if state is None:
        state = empty_cache(batch, kv_heads, key_dim, value_dim, window, dtype=keys.dtype, device=keys.device)
    _check_cache(state, keys, values, window)
    if validate:
        check_finite(queries=queries, keys=keys, values=values, cached_keys=state.keys, cached_values=state.values)
    reach = state.valid.shape[1] + time
    reach = reach if window is None else min(reach, window)
    return _engine(
        queries,
        keys,
        values,
        state,
        reset,
        window,
        1 / math.sqrt(key_dim) if scale is None else scale,
        _table("bias", bias, heads, reach, queries),
        weight,
        _table("multiplier", multiplier, heads, reach, queries),
    )


def _check_cache(state: AttentionState, keys: Tensor, values: Tensor, window: int | None) -> None:
    batch, _, kv_heads, key_dim = keys.shape
    cached = state.valid.shape[-1] if window is None else window - 1
    check_shape("state.valid", state.valid, (batch, cached), "batch cached")
    check_shape("state.keys", state.keys, (batch, cached, kv_heads, key_dim), "batch cached kv_heads key_dim")
    wanted = (batch, cached, kv_heads, values.shape[-1])
    check_shape("state.values", state.values, wanted, "batch cached kv_heads value_dim")


def _table(name: str, opening: Opening | None, heads: int, reach: int, like: Tensor) -> Tensor | None:
    """An opening as a table of the distances 0 … reach − 1."""
    if opening is None:
        return None
    table = opening if isinstance(opening, Tensor) else opening(torch.arange(reach, device=like.device))
    if table.ndim != 2 or table.shape[0] not in (1, heads) or table.shape[1] == 0:
        raise ShapeError(
            f"{name} must be (heads or 1, distances) with {heads} heads and at least one distance, "
            f"got shape {tuple(table.shape)}"
        )
    return table
