"""`exponential_attention` in Triton: a scan of the gates, then the memory walked over on chip.

    gates     the running maximum, and from it the weights of every token in its chunk; float64, a few numbers a token
    outputs   a program per (batch, head, block of value channels) walks over time with its part of the memory in
              registers: no state is written to memory but the last
    backward  the states that enter the chunks are computed again and written down, and from the end those by which
              their gradients rise (`states_kernel`); then three programs a chunk have all gradients of it at once;
              what they find for the gates is summed over time last

Where (batch, heads) are too few to fill the card, time is cut into segments: what each adds to the memory is computed
first, then combined, and the walks start from there. All sums have one order: results are the same in every run.

Half precision is multiplied on the tensor cores and summed in float32, float32 multiplied in full. The first
derivative is that of the formula, through normaliser, maximum and states; a second one is refused. Kept for it, beside
the arguments and h: the last state, eight numbers per token and head, and in bfloat16 what h lost when it was rounded.

In float32 results err by 1e-7 to 1e-6 of their size. Where keys have any sign and decays are weak, denominators come
near 0 and errors grow as 1 / den, in dq, dk and the gates' gradients as its square: at log-forget −1e-4 to 1e-5 after
1000 steps and 3e-5 after 4096. Float32 arguments determine no more: moving each by up to 2⁻²⁴ of itself moves the exact
results by a fifth of that or more, and with denominators and gates in float64 throughout a quarter to two thirds of
the error remain.

Source: the chunk form of Tiled Flash Linear Attention (arXiv 2503.14376), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ostinato.ops.kernels.triton.exponential_attention_launch as launches
from ostinato.ops.exponential_attention import ExponentialState
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.exponential_attention_backward import chunk_gradients_kernel, shares_kernel
from ostinato.ops.kernels.triton.exponential_attention_gates import gate_gradients_kernel
from ostinato.ops.kernels.triton.exponential_attention_launch import WIDEST
from ostinato.ops.kernels.triton.exponential_attention_memory import outputs_kernel
from ostinato.ops.kernels.triton.launch import fitting, power_of_two, without_second_derivative

_Made = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""h, the last state's three, and what is kept: states that enter segments, normalisers that do, the gates' four, and
what h lost when it was rounded."""
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def refuses(queries: Tensor, keys: Tensor, values: Tensor, *_: Any) -> str | None:
    """Why these kernels cannot serve the call, or None."""
    for tensor in (queries, keys, values):
        if tensor.dtype not in _TYPES:
            return f"the kernels take float32, bfloat16 and float16, got {tensor.dtype}"
        if tensor.shape[-1] > WIDEST:
            return f"the kernels take heads of at most {WIDEST} channels, got {tensor.shape[-1]}"
    return None


def declines(queries: Tensor, *_: Any) -> str | None:
    """Why another route is better, or None."""
    return "a single step needs no chunks" if queries.shape[1] == 1 else None


def _empty(
    call: launches.Call, values: Tensor, has_reset: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, launches.Gates]:
    """h, the last memory and normaliser, and what the gradients need: the states that enter segments, the gates."""
    shape = (call.batch, call.heads, call.keys)
    segments = launches.outputs_walk(call).segments
    entering = (call.rows, segments if segments > 1 else 0, call.keys)
    return (
        torch.empty_like(values),
        values.new_empty(*shape, call.values, dtype=torch.float32),
        values.new_empty(shape, dtype=torch.float32),
        values.new_empty(*entering, call.values, dtype=torch.float32),
        values.new_empty(entering, dtype=torch.float32),
        launches.empty_gates(call, values, has_reset),
    )


def _flat(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("ostinato::exponential_attention", mutates_args=())
def _forward(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Tensor | None,
    normalizer: Tensor | None,
    maximum: Tensor | None,
    reset: Tensor | None,
    eps: float,
) -> _Made:
    call = launches.call(queries, values)
    queries, keys, values = launches.whole(queries), launches.whole(keys), launches.whole(values)
    outputs, last, last_sum, *start, gates = _empty(call, values, reset is not None)
    lost = torch.empty_like(outputs) if call.two_terms else outputs
    launches.gates(call, gates, log_input.contiguous(), log_forget.contiguous(), _flat(maximum), _flat(reset))
    reach, source, enter, leave, inverse, side = gates.per_token[:6].unbind(0)
    initial: tuple[Tensor | None, Tensor | None] = (_flat(memory), _flat(normalizer))
    walk = launches.outputs_walk(call)
    if walk.segments > 1:
        held = launches.Recurrence(keys, values, leave, leave, gates.carried, reverse=False)
        launches.entering(call, start, held, initial)
        initial = (start[0], start[1])

    def launch(walk: launches.Walk) -> None:
        of_keys, of_values = (call.length, walk.block_keys), (call.length, walk.block_values)
        outputs_kernel[(-(-call.values // walk.block_values), call.rows * walk.segments)](
            launches.sequence(queries, *of_keys), launches.sequence(keys, *of_keys),
            launches.sequence(values, *of_values),
            gates.per_token[-1], reach, source, enter, leave, gates.carried, gates.maximum, gates.first_token,
            *initial, launches.sequence(outputs, *of_values), launches.sequence(lost, *of_values),
            inverse, side, last, last_sum,
            call.time, call.heads, call.chunks, walk.segment, walk.segments, eps,
            HAS_INITIAL=initial[0] is not None, HAS_RESET=reset is not None, EXACT=call.exact,
            BLOCK_KEYS=walk.block_keys, BLOCK_VALUES=walk.block_values, STAGES=walk.stages, num_warps=walk.warps,
            **call.dimensions(),
        )  # fmt: skip

    fitting(call.key("outputs", reset is not None), launch, walk.smaller("block_values"))
    lost = lost if call.two_terms else outputs.new_empty(0)
    return outputs, last, last_sum, gates.last_maximum, *start, *gates[:-1], lost  # type: ignore[return-value]


@_forward.register_fake
def _(queries: Tensor, keys: Tensor, values: Tensor, *rest: Any) -> _Made:
    reset = rest[-2]
    call = launches.call(queries, values)
    outputs, last, last_sum, *start, gates = _empty(call, values, reset is not None)
    outputs = outputs.contiguous()
    lost = outputs.new_empty(outputs.shape if call.two_terms else (0,))
    return outputs, last, last_sum, gates.last_maximum, *start, *gates[:-1], lost  # type: ignore[return-value]


@torch.library.custom_op("ostinato::exponential_attention_backward", mutates_args=())
def _backward(
    grads: Tensor,
    grad_memory: Tensor | None,
    grad_normalizer: Tensor | None,
    grad_maximum: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Tensor | None,
    normalizer: Tensor | None,
    maximum: Tensor | None,
    reset: Tensor | None,
    eps: float,
    outputs: Tensor,
    last: Tensor,
    last_sum: Tensor,
    entering: Tensor,
    entering_sum: Tensor,
    per_token: Tensor,
    maxima: Tensor,
    first_token: Tensor,
    carried: Tensor,
    lost: Tensor,
) -> _Gradients:
    call = launches.call(queries, values)
    queries, keys, values, grads = map(launches.whole, (queries, keys, values, grads))
    log_input, log_forget, reset = log_input.contiguous(), log_forget.contiguous(), _flat(reset)
    memory, normalizer, maximum = _flat(memory), _flat(normalizer), _flat(maximum)
    reach, source, enter, leave, inverse, side = per_token[:6].unbind(0)
    tokens = call.chunks * call.length
    delta, read, read_sum, by_maximum = per_token.new_empty(4, call.rows, tokens).unbind(0)
    all_values = (call.length, launches.block(call, call.values, WIDEST))
    shares_kernel[(call.rows, call.chunks)](
        launches.sequence(outputs, *all_values), launches.sequence(lost if call.two_terms else outputs, *all_values),
        launches.sequence(grads, *all_values),
        inverse, side, enter, delta, read, read_sum, by_maximum, call.heads, tokens, eps, HAS_LOST=call.two_terms,
        BLOCK_VALUES=all_values[1], LENGTH=call.length,
    )  # fmt: skip

    held = launches.Recurrence(keys, values, leave, leave, carried, reverse=False)
    rise = launches.Recurrence(queries, grads, read, read_sum, carried, reverse=True)
    by_last = None
    later: tuple[Tensor | None, Tensor | None] = (None, None)
    if grad_memory is not None or grad_normalizer is not None or grad_maximum is not None:
        grad_memory = torch.zeros_like(last) if grad_memory is None else grad_memory.contiguous()
        grad_normalizer = torch.zeros_like(last_sum) if grad_normalizer is None else grad_normalizer.contiguous()
        # The last state is in units of exp(m).
        by_last = -(last * grad_memory).sum((-1, -2)) - (last_sum * grad_normalizer).sum(-1)
        by_last = by_last if grad_maximum is None else by_last + grad_maximum
        later = (grad_memory, grad_normalizer)
    start: tuple[Tensor | None, Tensor | None] = (memory, normalizer)
    if entering.shape[1]:
        start = (entering, entering_sum)
        later = launches.entering(call, [torch.empty_like(entering), torch.empty_like(entering_sum)], rise, later)
    states, sums, *_ = launches.chunk_states(call, held, start)
    rising, rising_sums, grad_initial, grad_initial_sum = launches.chunk_states(call, rise, later)
    grad_queries, grad_keys, grad_values = torch.empty_like(queries), torch.empty_like(keys), torch.empty_like(values)
    inner = per_token.new_empty(5, call.rows, tokens)
    through = torch.empty_like(carried)

    def launch(walk: launches.Walk) -> None:
        of_keys, of_state = (call.length, walk.block_keys), (walk.block_keys, walk.block_values)
        chunk_gradients_kernel[(3, call.chunks, call.rows)](
            launches.sequence(queries, *of_keys), launches.sequence(keys, *of_keys),
            launches.sequence(values, *all_values), launches.sequence(grads, *all_values),
            per_token[-1], reach, source, leave, carried, first_token, inverse, delta, read, read_sum,
            launches.described(states, *of_state), sums, launches.described(rising, *of_state), rising_sums,
            launches.sequence(grad_queries, *of_keys), launches.sequence(grad_keys, *of_keys),
            launches.sequence(grad_values, *all_values), inner, through,
            call.heads, call.chunks, call.rows,
            HAS_RESET=reset is not None, EXACT=call.exact,
            BLOCK_KEYS=walk.block_keys, BLOCK_VALUES=walk.block_values, STAGES=walk.stages, num_warps=walk.warps,
            **call.dimensions(),
        )  # fmt: skip

    key = call.key("gradients", reset is not None)
    fitting(key, launch, launches.chunk_gradients_walk(call).smaller("block_keys"))
    grad_input, grad_forget = torch.empty_like(log_input), torch.empty_like(log_forget)
    grad_first = per_token.new_empty(call.batch, call.heads)
    blocks, chunks = launches.blocks_of_gates(call)
    factor, added = per_token.new_empty(2, call.rows, blocks).unbind(0)
    for summary in (True, False) if blocks > 1 else (False,):
        gate_gradients_kernel[(call.rows, blocks)](
            log_input, log_forget, reset, maximum, maxima, through, inner, by_maximum, by_last,
            grad_input, grad_forget, grad_first, factor, added,
            call.time, call.heads, call.chunks, call.rows,
            SUMMARY=summary, HAS_RESET=reset is not None, HAS_INITIAL=maximum is not None,
            HAS_LAST=by_last is not None, LENGTH=call.length, CHUNKS=chunks, BLOCKS=power_of_two(blocks),
        )  # fmt: skip
    if memory is not None and normalizer is not None:
        # The initial state is in units of exp of the initial maximum.
        grad_first += (memory * grad_initial).sum((-1, -2)) + (normalizer * grad_initial_sum).sum(-1)
    return grad_queries, grad_keys, grad_values, grad_input, grad_forget, grad_initial, grad_initial_sum, grad_first


@_backward.register_fake
def _(*arguments: Any) -> _Gradients:
    # After four gradients: queries, keys, values and gates; then state, reset, ε, outputs, and the last state.
    last, last_sum = arguments[15:17]
    like = (*arguments[4:9], last, last_sum)
    return *(tensor.new_empty(tensor.shape) for tensor in like), last.new_empty(last.shape[:2])  # type: ignore[return-value]


without_second_derivative(_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps = inputs
    outputs, last, last_sum, _, *kept = output
    ctx.save_for_backward(*tensors, outputs, last, last_sum, *kept)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
    # The operator's arguments but ε, then all that it makes but the last maximum.
    inputs, kept = ctx.saved_tensors[:9], ctx.saved_tensors[9:]
    grads, *of_state = cotangents[:4]
    grads = torch.zeros_like(kept[0]) if grads is None else grads
    found = call_once(_backward, grads, *of_state, *inputs, ctx.eps, *kept)
    return *found[:5], *((None,) * 3 if inputs[5] is None else found[5:]), None, None


_forward.register_autograd(_differentiate, setup_context=_save)
_attend = eagerly(_forward, _save, _differentiate)


def _padded(tensor: Tensor | None, *channels: int) -> Tensor | None:
    """The last axes, made as large as `channels` with zeros."""
    if tensor is None:
        return None
    lacking = [size - have for size, have in zip(channels, tensor.shape[-len(channels) :], strict=True)]
    return F.pad(tensor, [side for size in reversed(lacking) for side in (0, size)]) if any(lacking) else tensor


def run(
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
    """The route: see `ostinato.ops.exponential_attention`. The chunk size is the kernels' own."""
    dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), values.dtype)
    key_dim, value_dim = queries.shape[-1], values.shape[-1]
    # The hardware loads rows of multiples of 16 bytes.
    unit = 16 // dtype.itemsize
    k, v = -(-key_dim // unit) * unit, -(-value_dim // unit) * unit
    memory, normalizer, maximum = (None, None, None) if state is None else (part.float() for part in state)
    outputs, memory, normalizer, maximum, *_ = _attend(
        _padded(queries.to(dtype), k),
        _padded(keys.to(dtype), k),
        _padded(values.to(dtype), v),
        log_input,
        log_forget,
        _padded(memory, k, v),
        _padded(normalizer, k),
        maximum,
        reset,
        eps,
    )
    last = ExponentialState(memory[..., :key_dim, :value_dim], normalizer[..., :key_dim], maximum)
    return outputs[..., :value_dim].to(queries.dtype), last
