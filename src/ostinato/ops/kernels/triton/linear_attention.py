"""`linear_attention` in Triton: the operators, forward and backward, and how their launches are planned.

Forward and backward are the same walk over time in different roles (`linear_attention_walk` for one decay per
head or none, `linear_attention_channels` for one per key channel). Nothing but the arguments is
kept for the backward pass, which walks again.

Half precision is multiplied as such and summed up in float32, in which the state is kept on chip; float16, whose
range states and scores outgrow, is multiplied by them in tf32, which has its digits. Bfloat16 has few digits, so that
what is decayed is multiplied in two terms, itself rounded and what that lost. Float32 is multiplied in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ostinato.ops.checks import HALF, accumulation_dtype
from ostinato.ops.kernels.triton import linear_attention_channels_launch as channels
from ostinato.ops.kernels.triton import linear_attention_heads as heads
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import without_second_derivative
from ostinato.ops.kernels.triton.linear_attention_launch import Walks

LARGEST = 256
"""Of a head's key and value dimensions."""


def refuses(queries: Tensor, keys: Tensor, values: Tensor, *_: object) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    if queries.dtype not in (torch.float32, *HALF):
        return f"the kernels compute in float32, bfloat16 and float16, not {queries.dtype}"
    if keys.dtype != queries.dtype or values.dtype != queries.dtype:
        return "the kernels want queries, keys and values of one type"
    if max(keys.shape[-1], values.shape[-1]) > LARGEST:
        return f"the kernels hold head dimensions up to {LARGEST}, got {keys.shape[-1]} and {values.shape[-1]}"
    return None


def declines(queries: Tensor, *_: object) -> str | None:
    """Why another route is better though these kernels could serve the call, or None."""
    return "a single step needs no chunks" if queries.shape[1] == 1 else None


def _rowwise(tensor: Tensor) -> Tensor:
    """`tensor` with its last axis contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _state_like(queries: Tensor, values: Tensor) -> Tensor:
    """An empty state."""
    batch, _, heads, key_dim = queries.shape
    return queries.new_empty(batch, heads, key_dim, values.shape[-1], dtype=accumulation_dtype(queries.dtype))


def _as_state(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(accumulation_dtype(dtype)).contiguous()


def _walks(queries: Tensor, values: Tensor, log_decay: Tensor | None, reset: Tensor | None) -> Walks:
    reset = None if reset is None else reset.contiguous()
    if log_decay is None:
        return heads.prepared(queries, values, None, reset)
    kind = channels if log_decay.ndim == 4 else heads
    return kind.prepared(queries, values, log_decay.contiguous(), reset)


@torch.library.custom_op("ostinato::linear_attention", mutates_args=())
def forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs and the last state."""
    queries, keys, values = map(_rowwise, (queries, keys, values))
    walks, initial = _walks(queries, values, log_decay, reset), _as_state(state, queries.dtype)
    last = _state_like(queries, values)
    entering = walks.entering(keys, values, initial, last)
    ends = last if entering is initial else None
    return walks.outputs(queries, keys, values, initial=entering, last=ends), last


@forward.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return values.new_empty(values.shape), _state_like(queries, values)


@torch.library.custom_op("ostinato::linear_attention_backward", mutates_args=())
def backward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    grad: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, values, log-decays and state; empty where there is no such argument."""
    queries, keys, values, grad = map(_rowwise, (queries, keys, values, grad.to(queries.dtype)))
    walks, initial = _walks(queries, values, log_decay, reset), _as_state(state, queries.dtype)
    flowing = _as_state(grad_last, queries.dtype)
    end, start = _state_like(queries, values), _state_like(queries, values)
    entering = walks.entering(keys, values, initial, end)
    behind = walks.entering(queries, grad, flowing, start, reverse=True)
    of_queries, of_keys, of_decay = walks.gradients(queries, keys, values, grad, entering, behind, end)
    first = start if state is not None and behind is flowing else None
    of_values = walks.outputs(keys, queries, grad, initial=behind, last=first, reverse=True)
    of_state = queries.new_empty(0) if state is None else start.to(state.dtype)
    return of_queries, of_keys, of_values, of_decay, of_state


@backward.register_fake
def _(queries: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    like = (queries, *rest[:4])
    return tuple(queries.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in like)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None) -> tuple[Tensor | None, ...]:
    queries, keys, values, log_decay, state, reset = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(values)
    gradients = call_once(backward, queries, keys, values, log_decay, state, reset, grad, grad_last)
    of_decay = None if log_decay is None else gradients[3]
    of_state = None if state is None else gradients[4]
    return *gradients[:3], of_decay, of_state, None


forward.register_autograd(_differentiate, setup_context=_keep)
without_second_derivative(backward)
_attend = eagerly(forward, _keep, _differentiate)


def run(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The route: what `linear_attention`'s other routes compute. The kernels choose their own chunks."""
    return _attend(queries, keys, values, log_decay, state, reset)
