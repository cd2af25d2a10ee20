"""`delta_rule` in Triton: kernels over all chunks at once, and walks from chunk to chunk, the state on chip.

Forward: T and P of every chunk (`delta_rule_chunks.prepare`), then one walk (`delta_rule_walk.walk`). Backward: the
walk again, to have the states that enter the chunks, the walk back with the state's gradient, and the gradients
of all chunks at once (`delta_rule_chunks.gradients`). Between forward and backward only T, P and the factors of the
rows are kept.

Half precision is multiplied as such and summed up in float32, in which the state is kept on chip.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ostinato.ops.checks import HALF
from ostinato.ops.kernels.triton import delta_rule_chunks as chunks_of
from ostinato.ops.kernels.triton import delta_rule_walk as walks
from ostinato.ops.kernels.triton.launch import dot_precision, power_of_two, without_second_derivative

LARGEST = 256
"""Of a head's key and value dimensions."""


def refuses(
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
) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if queries.dtype not in (torch.float32, *HALF):
        return f"the kernels compute in float32, bfloat16 and float16, not {queries.dtype}"
    if keys.dtype != queries.dtype or values.dtype != queries.dtype:
        return "the kernels want queries, keys and values of one type"
    if max(keys.shape[-1], values.shape[-1]) > LARGEST:
        return f"the kernels hold head dimensions up to {LARGEST}, got {keys.shape[-1]} and {values.shape[-1]}"
    if keys.shape[1] // queries.shape[1] > 16:
        return "the kernels take at most 16 steps a token"
    if read_keys is not None or erase_keys is not None:
        return "the kernels read, erase and write with one key"
    if log_decay is not None and log_decay.ndim == 4:
        return "the kernels have one decay per head, not one per channel"
    return None


def declines(queries: Tensor, *_: object) -> str | None:
    """Why another route is better though these kernels could serve the call, or None."""
    return "a single step needs no chunks" if queries.shape[1] == 1 else None


class Plan(NamedTuple):
    """Sizes and launch options of one call."""

    batch: int
    tokens: int
    heads: int
    key_dim: int
    value_dim: int
    micro: int
    chunk: int
    chunks: int
    query_block: int
    key_block: int
    value_block: int
    """Of the walks."""
    walk_warps: int
    walk_stages: int
    back_block: int
    back_warps: int
    back_stages: int
    gradient_block: int
    gradient_warps: int
    gradient_stages: int
    prepare_warps: int

    @property
    def pairs(self) -> int:
        """Batch × heads."""
        return self.batch * self.heads

    def sizes(self) -> tuple[int, int, int]:
        """The sizes that are arguments of all kernels."""
        return self.tokens, self.heads, self.chunks

    def constants(self, *, values: int = 0) -> dict[str, Any]:
        """The compile-time constants that all kernels share; with `values`, also the value block of that width."""
        found = {
            "K": self.key_dim,
            "BK": self.key_block,
            "C": self.chunk,
            "MICRO": self.micro,
            "BQ": self.query_block,
        }
        return {**found, "V": self.value_dim, "BV": values} if values else found


OVERRIDES: dict[str, int] = {}
"""Launch options to try instead of the planned ones, by their names in `Plan`: for tuning."""


def plan(queries: Tensor, keys: Tensor, values: Tensor) -> Plan:
    """Choose the sizes of a call: chunks of 64 rows, 32 in float32, and value blocks that fit registers."""
    batch, tokens, heads, key_dim = queries.shape
    value_dim = values.shape[-1]
    micro = keys.shape[1] // tokens
    half = queries.dtype in HALF
    chunk = OVERRIDES.get("chunk", 64 if half else 32)
    per_chunk = chunk // micro
    key_block, all_values = max(16, power_of_two(key_dim)), max(16, power_of_two(value_dim))
    widest = min(64, 8192 // key_block) if half else 32
    found = Plan(
        batch=batch,
        tokens=tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        micro=micro,
        chunk=chunk,
        chunks=(tokens + per_chunk - 1) // per_chunk,
        query_block=max(16, power_of_two(per_chunk)),
        key_block=key_block,
        value_block=min(widest, all_values),
        walk_warps=4,
        walk_stages=2,
        back_block=min(widest, all_values),
        back_warps=4,
        back_stages=2,
        gradient_block=min(64 if half and key_block <= 128 else 32, all_values),
        gradient_warps=8,
        gradient_stages=1,
        prepare_warps=4,
    )
    return found._replace(**OVERRIDES) if OVERRIDES else found


def _options(queries: Tensor, beta: Tensor | None, log_decay: Tensor | None, reset: Tensor | None) -> dict[str, Any]:
    """The compile-time constants of the kernels in chunks."""
    half = queries.dtype in HALF
    return {
        "BETA": beta is not None,
        "DECAY": log_decay is not None,
        "RESET": reset is not None,
        "EXACT": not half,
        "PRECISION": dot_precision(queries.dtype),
    }


def _cdiv(a: int, b: int) -> int:
    return (a + b - 1) // b


@torch.library.custom_op("ostinato::delta_rule", mutates_args=())
def _forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, last state; and for the backward pass T, P, the factors of the rows and of the states."""
    p = plan(queries, keys, values)
    inverse = queries.new_empty(p.pairs, p.chunks, p.chunk, p.chunk)
    scores = queries.new_empty(p.pairs, p.chunks, p.query_block, p.chunk)
    factors = queries.new_empty(p.pairs, p.chunks, 4, p.chunk, dtype=torch.float32)
    carried = queries.new_empty(p.pairs, p.chunks, dtype=torch.float32)
    chunks_of.prepare[(p.chunks, p.pairs)](
        queries,
        keys,
        keys if beta is None else beta,
        keys if log_decay is None else log_decay,
        keys if reset is None else reset,
        inverse,
        scores,
        factors,
        carried,
        *p.sizes(),
        **p.constants(),
        **_options(queries, beta, log_decay, reset),
        NORMALIZE=normalize,
        SOLVE="ieee" if queries.dtype == torch.float32 else "tf32x3",
        num_warps=p.prepare_warps,
    )
    outputs = values.new_empty(p.batch, p.tokens, p.heads, p.value_dim)
    last = _walk(p, queries, keys, values, state, inverse, scores, factors, carried, outputs=outputs)
    return outputs, last, inverse, scores, factors, carried


def _walk(
    p: Plan,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    state: Tensor | None,
    inverse: Tensor,
    scores: Tensor,
    factors: Tensor,
    carried: Tensor,
    *,
    outputs: Tensor | None = None,
    kept: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The walk, with outputs or keeping the entering states and u. Returns the last state."""
    last = queries.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    walks.walk[(_cdiv(p.value_dim, p.value_block), p.pairs, 1)](
        queries,
        keys,
        keys,
        values,
        inverse,
        scores,
        factors,
        carried,
        factors if state is None else state,
        values if outputs is None else outputs,
        last,
        *((values, values) if kept is None else kept),
        *p.sizes(),
        p.chunks,
        **p.constants(values=p.value_block),
        OUTPUT=outputs is not None,
        KEEP=kept is not None,
        INITIAL=state is not None,
        TRANSITION=False,
        TIED=True,
        CHANNELS=False,
        PRECISION=dot_precision(queries.dtype),
        STAGES=p.walk_stages,
        num_warps=p.walk_warps,
    )
    return last


@_forward.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = plan(queries, keys, values)
    return (
        values.new_empty(p.batch, p.tokens, p.heads, p.value_dim),
        queries.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32),
        queries.new_empty(p.pairs, p.chunks, p.chunk, p.chunk),
        queries.new_empty(p.pairs, p.chunks, p.query_block, p.chunk),
        queries.new_empty(p.pairs, p.chunks, 4, p.chunk, dtype=torch.float32),
        queries.new_empty(p.pairs, p.chunks, dtype=torch.float32),
    )


@torch.library.custom_op("ostinato::delta_rule_backward", mutates_args=())
def _backward(
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    inverse: Tensor,
    scores: Tensor,
    factors: Tensor,
    carried: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, values, β, log-decays and initial state (empty where there is none)."""
    p = plan(queries, keys, values)
    entering = queries.new_empty(p.pairs, p.chunks, p.key_dim, p.value_dim)
    leaving = torch.empty_like(entering)
    fresh, residual = torch.empty_like(values), torch.empty_like(values)
    _walk(p, queries, keys, values, state, inverse, scores, factors, carried, kept=(entering, fresh))
    grad_initial = queries.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    walks.walk_back[(_cdiv(p.value_dim, p.back_block), p.pairs, 1)](
        queries,
        keys,
        keys,
        grad_outputs,
        inverse,
        scores,
        factors,
        carried,
        factors if grad_last is None else grad_last,
        grad_initial,
        leaving,
        residual,
        *p.sizes(),
        p.chunks,
        **p.constants(values=p.back_block),
        KEEP=True,
        FINAL=grad_last is not None,
        TIED=True,
        CHANNELS=False,
        PRECISION=dot_precision(queries.dtype),
        STAGES=p.back_stages,
        num_warps=p.back_warps,
    )
    grad_queries, grad_keys, grad_values = (torch.empty_like(x) for x in (queries, keys, values))
    grad_beta = factors.new_empty(0 if beta is None else beta.shape)
    grad_decay = factors.new_empty(0 if log_decay is None else log_decay.shape)
    chunks_of.gradients[(p.chunks, p.pairs)](
        queries,
        keys,
        values,
        keys if beta is None else beta,
        keys if log_decay is None else log_decay,
        keys if reset is None else reset,
        scores,
        entering,
        leaving,
        fresh,
        residual,
        grad_outputs,
        grad_queries,
        grad_keys,
        grad_values,
        grad_beta,
        grad_decay,
        *p.sizes(),
        **p.constants(values=p.gradient_block),
        **_options(queries, beta, log_decay, reset),
        NORMALIZE=normalize,
        STAGES=p.gradient_stages,
        num_warps=p.gradient_warps,
    )
    return grad_queries, grad_keys, grad_values, grad_beta, grad_decay, grad_initial


@_backward.register_fake
def _(
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    inverse: Tensor,
    scores: Tensor,
    factors: Tensor,
    carried: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, key_dim = queries.shape
    return (
        torch.empty_like(queries),
        torch.empty_like(keys),
        torch.empty_like(values),
        factors.new_empty(0 if beta is None else beta.shape),
        factors.new_empty(0 if log_decay is None else log_decay.shape),
        factors.new_empty(batch, heads, key_dim, values.shape[-1]),
    )


without_second_derivative(_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normalize = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    queries, keys, values, beta, log_decay, state, reset, *kept = ctx.saved_tensors
    if grad is None:
        grad = values.new_zeros(*queries.shape[:3], values.shape[-1])
    if grad_last is not None:
        grad_last = grad_last.contiguous()
    found = _backward(
        grad.contiguous(), grad_last, queries, keys, values, beta, log_decay, state, reset, *kept, ctx.normalize
    )
    given = (queries, keys, values, beta, log_decay, state)
    grads = (None if x is None else g.to(x.dtype) for x, g in zip(given, found, strict=True))
    return *grads, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def run(
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
    """The route: what `ostinato.ops.delta_rule` describes. `chunk_size` is the plain route's alone."""

    def dense(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    outputs, last, *_ = _forward(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        dense(beta),
        dense(log_decay),
        dense(state),
        None if reset is None else reset.contiguous().view(torch.uint8),
        normalize,
    )
    return outputs, last
