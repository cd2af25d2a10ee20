"""`linear_attention` in Triton: the operators, forward and backward, and how their launches are planned.

Forward and backward are the same walk over time in different roles (`linear_attention_walk` for one decay per
head or none, `linear_attention_channels` for one per key channel). Nothing but the arguments is
kept for the backward pass, which walks again.

Half precision is multiplied as such and summed up in float32, in which the state is kept on chip; float16, whose
range states and scores outgrow, is multiplied by them in tf32, which has its digits. Float32 is multiplied in full.
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

LARGEST = 256
"""Of a head's key and value dimensions."""


def refuses(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    chunk_size: int,
) -> str | None:
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
    if log_decay is not None and log_decay.ndim == 4:
        return channels.forward(queries, keys, values, log_decay, state, reset)
    return heads.forward(queries, keys, values, log_decay, state, reset)


@forward.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, time, count, key_dim = queries.shape
    last = queries.new_empty(batch, count, key_dim, values.shape[-1], dtype=accumulation_dtype(queries.dtype))
    return values.new_empty(batch, time, count, values.shape[-1]), last


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
    if log_decay is not None and log_decay.ndim == 4:
        return channels.backward(queries, keys, values, log_decay, state, reset, grad, grad_last)
    return heads.backward(queries, keys, values, log_decay, state, reset, grad, grad_last)


@backward.register_fake
def _(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    reset: Tensor | None,
    grad: Tensor,
    grad_last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def like(tensor: Tensor | None) -> Tensor:
        return queries.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape)

    return like(queries), like(keys), like(values), like(log_decay), like(state)


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
