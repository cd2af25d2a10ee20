"""`delta_rule` in Triton: kernels over all chunks at once, and walks from chunk to chunk, the state on chip.

Forward: Y and P of every chunk (`delta_rule_chunks`, or `delta_rule_channels` where every key channel has its decay),
then one walk (`delta_rule_walk`). Backward: the walk again, to have the states that enter the chunks, the walk back
with the state's gradient, and the gradients of all chunks at once. Between forward and backward only Y, P, the
factors of the rows and the queries and keys as they are multiplied are kept, none of them where decays are per channel.

Keys of their own to read, to erase and to write are served by the kernels of decays per channel (see `_rows`).

Half precision is multiplied as float16 that is scaled by powers of two (`delta_rule_parts`), and summed up in float32,
in which the state is kept on chip.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ostinato.ops.checks import HALF
from ostinato.ops.delta_rule import unit_length
from ostinato.ops.kernels.triton import delta_rule_launch as launches
from ostinato.ops.kernels.triton.delta_rule_launch import Inputs
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
    *_: object,
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
    most = 16 if erase_keys is None else 8
    if keys.shape[1] // queries.shape[1] > most:
        return f"the kernels take at most {most} steps a token" + ("" if erase_keys is None else " with keys to erase")
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


def _none(queries: Tensor) -> list[Tensor]:
    """In the place of what is kept of the chunks, where the backward pass makes it anew."""
    return [queries.new_empty(0) for _ in range(6)]


@torch.library.custom_op("ostinato::delta_rule", mutates_args=())
def _forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    write_keys: Tensor | None,
    reset: Tensor | None,
    state: Tensor | None,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs, last state; for the backward pass queries and keys as they are multiplied, Y, P, factors of rows and
    states, and what of segments is kept.
    """
    inputs = Inputs(queries, keys, values, beta, log_decay, write_keys, reset, normalize)
    p = _plan(queries, keys, values, log_decay)
    chunks = launches.prepare(p, inputs)
    outputs = values.new_empty(p.batch, p.tokens, p.heads, p.value_dim)
    last, entering, transitions = launches.walk(p, chunks, values, state, outputs)
    kept = _none(queries) if _by_channel(log_decay) else (chunks.asking, chunks.reading, *chunks.walks())
    asking, reading, inverse, scores, factors, carried = kept
    return outputs, last, asking, reading, inverse, scores, factors, carried, entering, transitions


@_forward.register_fake
def _(
    queries: Tensor, keys: Tensor, values: Tensor, beta: Tensor | None, log_decay: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    p = _plan(queries, keys, values, log_decay)
    outputs = values.new_empty(p.batch, p.tokens, p.heads, p.value_dim)
    last = queries.new_empty(p.batch, p.heads, p.key_dim, p.value_dim, dtype=torch.float32)
    if _by_channel(log_decay):
        kept = _none(queries)
    else:
        kept = [torch.empty_like(x, dtype=launches.narrow(x.dtype)) for x in (queries, keys)]
        kept.extend(launches.empty_chunks(p, queries, channels=False))
    asking, reading, inverse, scores, factors, carried = kept
    entering, transitions = launches.empty_segments(p, values)
    return outputs, last, asking, reading, inverse, scores, factors, carried, entering, transitions


@torch.library.custom_op("ostinato::delta_rule_backward", mutates_args=())
def _backward(
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    write_keys: Tensor | None,
    reset: Tensor | None,
    state: Tensor | None,
    asking: Tensor,
    reading: Tensor,
    inverse: Tensor,
    scores: Tensor,
    factors: Tensor,
    carried: Tensor,
    segment_states: Tensor,
    transitions: Tensor,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, values, β, log-decays, writing keys (empty where there is none), first state."""
    inputs = Inputs(queries, keys, values, beta, log_decay, write_keys, reset, normalize)
    p = _plan(queries, keys, values, log_decay)
    if _by_channel(log_decay):
        chunks = launches.prepare(p, inputs)
    else:
        chunks = launches.Chunks(asking, reading, reading, inverse, scores, factors, carried, None)
    walked, grad_values = launches.empty_walked(p, values), torch.empty_like(values)
    launches.walk_again(p, chunks, values, state, segment_states, walked)
    grad_initial = launches.walk_back(p, chunks, grad_outputs, grad_last, transitions, walked, grad_values)
    of_queries, of_keys, of_beta, of_decay, of_writing = launches.gradients(p, chunks, inputs, walked, grad_outputs)
    return of_queries, of_keys, grad_values, of_beta, of_decay, of_writing, grad_initial


@_backward.register_fake
def _(
    grad_outputs: Tensor,
    grad_last: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    write_keys: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, heads, key_dim = (queries.shape[axis] for axis in (0, 2, 3))

    def like(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        return queries.new_empty((0,) if tensor is None else tensor.shape, dtype=dtype)

    return (
        torch.empty_like(queries),
        torch.empty_like(keys),
        torch.empty_like(values),
        like(beta),
        like(log_decay),
        like(write_keys, queries.dtype),
        queries.new_empty(batch, heads, key_dim, values.shape[-1], dtype=torch.float32),
    )


without_second_derivative(_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.normalize = inputs
    if not _by_channel(tensors[4]):
        # Of queries and keys the backward pass reads what the forward pass made of them: stand-ins take no memory.
        tensors[:2] = (x.new_empty(1).expand(x.shape) for x in tensors[:2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[2:])


def _differentiate(ctx: Any, grad: Tensor | None, grad_last: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    given, state = ctx.saved_tensors[:6], ctx.saved_tensors[7]
    queries, values = given[0], given[2]
    if grad is None:
        grad = values.new_zeros(*queries.shape[:3], values.shape[-1])
    if grad_last is not None:
        grad_last = grad_last.contiguous()
    *found, of_state = call_once(_backward, grad.contiguous(), grad_last, *ctx.saved_tensors, ctx.normalize)
    grads = (None if x is None else g.to(x.dtype) for x, g in zip(given, found, strict=True))
    return *grads, None, None if state is None else of_state.to(state.dtype), None


_forward.register_autograd(_differentiate, setup_context=_save)
_apply = eagerly(_forward, _save, _differentiate)


def _rows(
    keys: Tensor, values: Tensor, beta: Tensor | None, read_keys: Tensor | None, erase_keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Keys that read, values, β and keys that write, of rows S ← S + β w (v − kᵀ S)ᵀ.

    A step that reads and writes with two keys is one such row. One with a third key, e, to erase is two of them:
    the first reads with r and writes under e, without a value; the second writes under k, and reads nothing.
    """
    if read_keys is None and erase_keys is None:
        return keys, values, beta, None
    read = keys if read_keys is None else read_keys.to(keys.dtype)
    if erase_keys is None:
        return read, values, beta, keys

    def in_turn(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), dim=2).flatten(1, 2)

    return (
        in_turn(read, torch.zeros_like(keys)),
        in_turn(torch.zeros_like(values), values),
        None if beta is None else in_turn(beta, beta),
        in_turn(erase_keys.to(keys.dtype), keys),
    )


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
    if read_keys is not None or erase_keys is not None:
        # Only the kernels of decays per channel tell keys that read from keys that write.
        if log_decay is None:
            log_decay = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
        elif not _by_channel(log_decay):
            log_decay = log_decay.unsqueeze(-1).expand(queries.shape)
        if normalize:
            queries, keys, normalize = unit_length(queries), unit_length(keys), False
    keys, values, beta, write_keys = _rows(keys, values, beta, read_keys, erase_keys)

    def dense(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.contiguous()

    outputs, last, *_ = _apply(
        queries.contiguous(),
        keys.contiguous(),
        values.contiguous(),
        dense(beta),
        dense(log_decay),
        dense(write_keys),
        None if reset is None else reset.contiguous().view(torch.uint8),
        dense(state),
        normalize,
    )
    return outputs, last
