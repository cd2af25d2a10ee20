"""`delta_rule` in Triton: kernels over all chunks at once, and walks from chunk to chunk, the state on chip.

Forward: Y and P of every chunk (`delta_rule_chunks`, or `delta_rule_channels` where every key channel has its decay),
then one walk (`delta_rule_walk`). Backward: the walk again, to have the states that enter the chunks, the walk back
with the state's gradient, and the gradients of all chunks at once. Between forward and backward only Y, P and the
factors of the rows are kept, and none of them where decays are per channel.

Half precision is multiplied as such and summed up in float32, in which the state is kept on chip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ostinato.ops.checks import HALF
from ostinato.ops.kernels.triton import delta_rule_launch as launches
from ostinato.ops.kernels.triton.delta_rule_plan import Plan, plan
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import without_second_derivative
from ostinato.ops.kernels.triton.tuned import tuned

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
    if queries.dtype == torch.float32 and keys.shape[-1] > LARGEST // 2:
        return f"in float32 the kernels hold keys of up to {LARGEST // 2} channels, got {keys.shape[-1]}"
    if keys.shape[1] // queries.shape[1] > 16:
        return "the kernels take at most 16 steps a token"
    if read_keys is not None or erase_keys is not None:
        return "the kernels read, erase and write with one key"
    return None


def declines(queries: Tensor, *_: object) -> str | None:
    """Why another route is better though these kernels could serve the call, or None."""
    return "a single step needs no chunks" if queries.shape[1] == 1 else None


def _plan(queries: Tensor, keys: Tensor, values: Tensor, log_decay: Tensor | None) -> Plan:
    channels = _by_channel(log_decay)
    found = plan(queries, keys, values, channels=channels)
    return tuned("delta_rule", found, queries.dtype, queries.shape[-1], values.shape[-1], channels)


def _by_channel(log_decay: Tensor | None) -> bool:
    return log_decay is not None and log_decay.ndim == 4


def _none(queries: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In the place of Y, P and factors, where the backward pass makes them anew."""
    a, b, c, d = (queries.new_empty(0) for _ in range(4))
    return a, b, c, d


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, last state; for the backward pass Y, P, factors of rows and states, and what of segments is kept."""
    p = _plan(queries, keys, values, log_decay)
    chunks = launches.prepare(p, queries, keys, beta, log_decay, reset, normalize)
    outputs = values.new_empty(p.batch, p.tokens, p.heads, p.value_dim)
    last, entering, transitions = launches.walk(p, chunks, values, state, outputs)
    inverse, scores, factors, carried = _none(queries) if _by_channel(log_decay) else chunks.walks()
    return outputs, last, inverse, scores, factors, carried, entering, transitions


@_forward.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor | None, log_decay: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = _plan(queries, keys, values, log_decay)
    outputs = values.new_empty(p.batch, p.tokens, p.heads, p.value_dim)
    last = queries.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    kept = _none(queries) if _by_channel(log_decay) else launches.empty_chunks(p, queries, channels=False)
    return outputs, last, *kept, *launches.empty_segments(p, values)


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
    segment_states: Tensor,
    transitions: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, values, β, log-decays and initial state (empty where there is none)."""
    p = _plan(queries, keys, values, log_decay)
    if _by_channel(log_decay):
        chunks = launches.prepare(p, queries, keys, beta, log_decay, reset, normalize)
    else:
        chunks = launches.Chunks(queries, keys, keys, inverse, scores, factors, carried, None)
    entering = queries.new_empty(p.pairs, p.chunks, p.key_dim, p.value_dim)
    leaving = torch.empty_like(entering)
    fresh, residual = torch.empty_like(values), torch.empty_like(values)
    launches.walk_again(p, chunks, values, state, segment_states, (entering, fresh))
    grad_initial = launches.walk_back(p, chunks, grad_outputs, grad_last, transitions, (leaving, residual))
    inputs, walked = (queries, keys, values, beta, log_decay, reset), (entering, leaving, fresh, residual)
    return *launches.gradients(p, chunks, inputs, walked, grad_outputs, normalize), grad_initial


@_backward.register_fake
def _(
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, key_dim = (queries.shape[axis] for axis in (0, 2, 3))

    def wide(*shape: int) -> Tensor:
        return queries.new_empty(shape, dtype=torch.float32)

    return (
        torch.empty_like(queries),
        torch.empty_like(keys),
        torch.empty_like(values),
        wide(*((0,) if beta is None else beta.shape)),
        wide(*((0,) if log_decay is None else log_decay.shape)),
        wide(batch, heads, key_dim, values.shape[-1]),
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
    inputs = (queries, keys, values, beta, log_decay, state, reset)
    found = call_once(_backward, grad.contiguous(), grad_last, *inputs, *kept, ctx.normalize)
    given = (queries, keys, values, beta, log_decay, state)
    grads = (None if x is None else g.to(x.dtype) for x, g in zip(given, found, strict=True))
    return *grads, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_apply = eagerly(_forward, _save, _differentiate)


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

    outputs, last, *_ = _apply(
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
