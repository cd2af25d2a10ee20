"""`short_convolution` in Triton: x read and y written forward; x and dy read and dx written backward; nothing kept.

A program walks along the steps of a few channels with the last inputs in registers; backward also with the gradients
of these inputs, to which every step adds, and with those of its taps. What went into silu is computed again. Steps are
read once, but for the few before a program's first and after its last. The programs' gradients of taps and bias are
summed by PyTorch: in the same order every time.

Inputs side by side that are of one type, and activated or not alike, are computed in one launch.
"""

# Kernels join tuples by +, Triton has no stars in them, and mypy takes the first of a tuple's lengths for its type.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment, var-annotated"

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import card, cdiv, power_of_two, without_second_derivative
from ostinato.ops.kernels.triton.newton_scan_cells import LOG2E, gate

_WIDEST = 16
_CHANNELS, _WARPS = 128, 1
"""Channels of a program of at most four taps, four a thread; more taps leave registers for fewer."""
_LEAST = 32
"""Steps of a program, about, at least."""
Parts = tuple[Tensor, ...]


class _Walk(NamedTuple):
    """How a kernel is dealt out."""

    unrolled: int
    """Steps whose loads are under way together."""
    programs: int
    """For a multiprocessor: no more than it has room for at a time, with as many registers."""
    registers: int
    """Of a thread, at most."""


_FORWARD = _Walk(unrolled=8, programs=16, registers=128)
_BACKWARD = _Walk(unrolled=4, programs=16, registers=128)


@triton.jit
def chosen(these, starts, PARTS: tl.constexpr):
    """Of a tuple with an entry for each part, that of this program's; `starts` are the first blocks of the parts."""
    found = these[0]
    for i in tl.static_range(1, PARTS):
        found = tl.where(tl.program_id(0) >= starts[i], these[i], found)
    return found


@triton.jit
def zeros(like, COUNT: tl.constexpr):
    """A tuple of zeros, each for the channels `like`."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros_like(like).to(tl.float32),)
    return found


@triton.jit
def begins(reset, step, time):
    """Whether a new sequence begins at this step."""
    return tl.load(reset + step, mask=(step >= 0) & (step < time), other=0) != 0


@triton.jit
def cleared(past, new, PAST: tl.constexpr):
    """The inputs before a step, as far as they are of its sequence."""
    kept = ()
    for lag in tl.static_range(PAST):
        kept = kept + (tl.where(new, 0.0, past[lag]),)
    return kept


@triton.jit
def shifted(past, x, PAST: tl.constexpr):
    """The inputs before the next step, the last one first."""
    window = (x,) + past
    return window[:PAST]


@triton.jit
def before(inputs, state, reset, first, time, row, state_row, channel, wide, PAST: tl.constexpr, RESET: tl.constexpr):
    """The inputs before the step `first`, the last one first; those before the sequence are in the state."""
    past = zeros(channel, PAST)
    for i in tl.static_range(PAST):
        step = first - PAST + i
        x = tl.load(inputs + step * row + channel, mask=wide & (step >= 0), other=0.0).to(tl.float32)
        x += tl.load(state + i * state_row + channel, mask=wide & (first == 0), other=0.0).to(tl.float32)
        if RESET:
            past = cleared(past, begins(reset, step, time), PAST)
        past = shifted(past, x, PAST)
    return past


@triton.jit
def taps_and_offset(weight, bias, weight_row, channel, wide, WIDTH: tl.constexpr, BIAS: tl.constexpr):
    """The weights of some channels, a tuple, and the bias, or zeros."""
    taps = ()
    for lag in tl.static_range(WIDTH):
        taps = taps + (tl.load(weight + lag * weight_row + channel, mask=wide, other=0.0).to(tl.float32),)
    offset = tl.zeros_like(channel).to(tl.float32)
    if BIAS:
        offset += tl.load(bias + channel, mask=wide, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def convolved(x, past, taps, offset, PAST: tl.constexpr):
    """b + Σ_i w_i x_{t−i}."""
    total = offset + taps[0] * x
    for lag in tl.static_range(PAST):
        total += taps[lag + 1] * past[lag]
    return total


@triton.jit(do_not_specialize=["time", "steps"])
def _forward(
    inputs, outputs, channels, starts, shifts, weight, bias, state, reset, time, steps,
    weight_row, state_batch, state_row,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr, SILU: tl.constexpr,
    UNROLLED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Within a sequence 32 bits address everything (`refuses` sees to it); between sequences they might not.
    PAST: tl.constexpr = WIDTH - 1
    batch = tl.program_id(2).to(tl.int64)
    row, shift = chosen(channels, starts, PARTS), chosen(shifts, starts, PARTS)
    channel = (tl.program_id(0) - chosen(starts, starts, PARTS)) * CHANNELS + tl.arange(0, CHANNELS)
    wide = channel < row
    x_of = chosen(inputs, starts, PARTS) + batch * time * row
    y_of = chosen(outputs, starts, PARTS) + batch * time * row
    state += batch * state_batch + shift
    if RESET:
        reset += batch * time
    first = tl.program_id(1) * steps
    last = min(first + steps, time)
    taps, offset = taps_and_offset(
        weight + shift, bias + shift if BIAS else bias, weight_row, channel, wide, WIDTH, BIAS
    )
    past = before(x_of, state, reset, first, time, row, state_row, channel, wide, PAST, RESET)
    for start in range(first, last, UNROLLED):
        xs = ()
        for i in tl.static_range(UNROLLED):
            xs = xs + (tl.load(x_of + (start + i) * row + channel, mask=wide & (start + i < last), other=0.0),)
        for i in tl.static_range(UNROLLED):
            step = start + i
            x = xs[i].to(tl.float32)
            if RESET:
                past = cleared(past, begins(reset, step, time), PAST)
            y = convolved(x, past, taps, offset, PAST)
            past = shifted(past, x, PAST)
            if SILU:
                y = y * gate(y * (-LOG2E))
            tl.store(y_of + step * row + channel, y, mask=wide & (step < last))


@triton.jit(do_not_specialize=["time", "steps"])
def _backward(
    inputs, grads, grad_inputs, channels, starts, shifts, weight, bias, state, reset, grad_state, partial, time, steps,
    all_channels, weight_row, state_batch, state_row,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr, SILU: tl.constexpr,
    OF_STATE: tl.constexpr, UNROLLED: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    PAST: tl.constexpr = WIDTH - 1
    batch = tl.program_id(2).to(tl.int64)
    row, shift = chosen(channels, starts, PARTS), chosen(shifts, starts, PARTS)
    channel = (tl.program_id(0) - chosen(starts, starts, PARTS)) * CHANNELS + tl.arange(0, CHANNELS)
    wide = channel < row
    x_of = chosen(inputs, starts, PARTS) + batch * time * row
    dy_of = chosen(grads, starts, PARTS) + batch * time * row
    dx_of = chosen(grad_inputs, starts, PARTS) + batch * time * row
    state += batch * state_batch + shift
    if RESET:
        reset += batch * time
    first = tl.program_id(1) * steps
    last = min(first + steps, time)
    taps, offset = taps_and_offset(
        weight + shift, bias + shift if BIAS else bias, weight_row, channel, wide, WIDTH, BIAS
    )
    past = before(x_of, state, reset, first, time, row, state_row, channel, wide, PAST, RESET)
    of_past, of_taps = zeros(channel, PAST), zeros(channel, WIDTH)
    of_bias = tl.zeros((CHANNELS,), tl.float32)
    same = ()  # whether the input of so many steps ago is of the same sequence
    if RESET:
        for _ in tl.static_range(PAST):
            same = same + (first >= 0,)
    # A step's dx is complete PAST steps later. Those PAST steps after the last are the next program's: dx needs them.
    for start in range(first, last + PAST, UNROLLED):
        xs, dys = (), ()
        for i in tl.static_range(UNROLLED):
            there = wide & (start + i < time)
            xs = xs + (tl.load(x_of + (start + i) * row + channel, mask=there, other=0.0),)
            dys = dys + (tl.load(dy_of + (start + i) * row + channel, mask=there, other=0.0),)
        for i in tl.static_range(UNROLLED):
            step = start + i
            x, dz = xs[i].to(tl.float32), dys[i].to(tl.float32)
            if RESET:
                new = begins(reset, step, time)
                past = cleared(past, new, PAST)
                longer = (new == 0,)
                for lag in tl.static_range(PAST):
                    longer = longer + (same[lag] & (new == 0),)
                same = longer[:PAST]
            if SILU:
                z = convolved(x, past, taps, offset, PAST)
                share = gate(z * (-LOG2E))
                dz = dz * share * (1 + z * (1 - share))
            dx = (taps[0] * dz,)
            for lag in tl.static_range(PAST):
                tap = taps[lag + 1]
                if RESET:
                    tap = tl.where(same[lag], tap, 0.0)
                dx = dx + (of_past[lag] + tap * dz,)
            of_past = dx[:PAST]
            place = step - PAST
            tl.store(dx_of + place * row + channel, dx[PAST], mask=wide & (place >= first) & (place < last))
            if OF_STATE:
                early = grad_state + (batch * PAST + step) * all_channels + shift + channel
                tl.store(early, dx[PAST], mask=wide & (place < 0))
            dz = tl.where(step < last, dz, 0.0)
            of_bias += dz
            products = (of_taps[0] + dz * x,)
            for lag in tl.static_range(PAST):
                products = products + (of_taps[lag + 1] + dz * past[lag],)
            of_taps = products
            past = shifted(past, x, PAST)
    sums = partial + (batch * tl.num_programs(1) + tl.program_id(1)) * (WIDTH + BIAS) * all_channels + shift + channel
    for lag in tl.static_range(WIDTH):
        tl.store(sums + lag * all_channels, of_taps[lag], mask=wide)
    if BIAS:
        tl.store(sums + WIDTH * all_channels, of_bias, mask=wide)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with its last axis contiguous: slices of channels are read where they stand."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _contiguous(tensors: Sequence[Tensor]) -> Parts:
    return tuple(tensor.contiguous() for tensor in tensors)


def _room(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For what is to be written of the sizes of these."""
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


class _Plan(NamedTuple):
    """Which channels and steps of several inputs a program has."""

    grid: tuple[int, int, int]
    channels: tuple[int, ...]
    starts: tuple[int, ...]
    """The first block of each part."""
    shifts: tuple[int, ...]
    """The channels before each part."""
    steps: int
    """Of a program."""
    block: int
    """Channels of a program."""


def _plan(inputs: Sequence[Tensor], width: int, walk: _Walk, beyond: int = 0) -> _Plan:
    """`beyond`: the steps after its last that a program goes on."""
    batch, time, _ = inputs[0].shape
    channels = tuple(part.shape[2] for part in inputs)
    block = min(_CHANNELS, _CHANNELS * 4 // power_of_two(width))
    blocks = [cdiv(each, block) for each in channels]
    pieces = max(1, card(inputs[0].device).processors * walk.programs // max(1, sum(blocks) * batch))
    steps = max(_LEAST, cdiv(time, pieces)) + beyond
    steps = cdiv(steps, walk.unrolled) * walk.unrolled - beyond
    grid = (sum(blocks), cdiv(time, steps), batch)
    return _Plan(grid, channels, (0, *accumulate(blocks[:-1])), (0, *accumulate(channels[:-1])), steps, block)


@torch.library.custom_op("ostinato::short_convolution", mutates_args=())
def convolve(
    weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: bool, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """y of `short_convolution` of each of several inputs side by side, or silu(y)."""
    outputs, plan = _room(inputs), _plan(inputs, weight.shape[0], _FORWARD)
    weight, state = _rows(weight), _rows(state)
    _forward[plan.grid](
        _contiguous(inputs), tuple(outputs), plan.channels, plan.starts, plan.shifts, weight,
        None if bias is None else bias.contiguous(), state, None if reset is None else reset.contiguous(),
        inputs[0].shape[1], plan.steps, weight.stride(0), state.stride(0), state.stride(1),
        PARTS=len(inputs), WIDTH=weight.shape[0], BIAS=bias is not None, RESET=reset is not None, SILU=silu,
        UNROLLED=_FORWARD.unrolled, CHANNELS=plan.block, num_warps=_WARPS, maxnreg=_FORWARD.registers,
    )  # fmt: skip
    return outputs


@convolve.register_fake
def _(
    weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: bool, inputs: Sequence[Tensor]
) -> list[Tensor]:
    return _room(inputs)


@torch.library.custom_op("ostinato::short_convolution_backward", mutates_args=())
def convolve_backward(
    weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: bool, of_state: bool,
    inputs_and_grads: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    """The gradients of the inputs, of the weight with that of a bias below it, and of the state if it is wanted."""
    inputs, grads = _halves(inputs_and_grads)
    width, channels = weight.shape
    plan, rows = _plan(inputs, width, _BACKWARD, width - 1), width + int(bias is not None)
    grad_inputs, grad_state = _room(inputs), _room([state][:of_state])
    partial = torch.empty(plan.grid[1] * plan.grid[2], rows, channels, dtype=torch.float32, device=weight.device)
    weight, state = _rows(weight), _rows(state)
    _backward[plan.grid](
        _contiguous(inputs), _contiguous(grads), tuple(grad_inputs), plan.channels, plan.starts, plan.shifts, weight,
        None if bias is None else bias.contiguous(), state, None if reset is None else reset.contiguous(),
        grad_state[0] if of_state else None, partial, inputs[0].shape[1], plan.steps, channels,
        weight.stride(0), state.stride(0), state.stride(1),
        PARTS=len(inputs), WIDTH=width, BIAS=bias is not None, RESET=reset is not None, SILU=silu, OF_STATE=of_state,
        UNROLLED=_BACKWARD.unrolled, CHANNELS=plan.block, num_warps=_WARPS, maxnreg=_BACKWARD.registers,
    )  # fmt: skip
    return [*grad_inputs, partial.sum(0), *grad_state]


def _halves(tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    return tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]


@convolve_backward.register_fake
def _(
    weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: bool, of_state: bool,
    inputs_and_grads: Sequence[Tensor],
) -> list[Tensor]:  # fmt: skip
    rows = weight.shape[0] + int(bias is not None)
    sums = torch.empty(rows, weight.shape[1], dtype=torch.float32, device=weight.device)
    return [*_room(_halves(inputs_and_grads)[0]), sums, *_room([state][:of_state])]


without_second_derivative(convolve_backward)


class _Spread:
    """An operator that ends in a list of tensors, as one that takes them one by one: autograd looks into no lists."""

    def __init__(self, operator: Any, before: int) -> None:
        self._qualname, self.operator, self.before = operator._qualname, operator, before

    def _init_fn(self, *arguments: Any) -> Parts:
        return tuple(self.operator._init_fn(*arguments[: self.before], arguments[self.before :]))

    def __call__(self, *arguments: Any) -> Parts:
        return tuple(self.operator(*arguments[: self.before], arguments[self.before :]))


_convolve_backward = _Spread(convolve_backward, before=6)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    weight, bias, state, reset, ctx.silu, *parts = inputs
    ctx.save_for_backward(weight, bias, state, reset, *parts)


def _gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    weight, bias, state, reset, *parts = ctx.saved_tensors
    of_state = ctx.needs_input_grad[2]
    found = call_once(_convolve_backward, weight, bias, state, reset, ctx.silu, of_state, *parts, *grads)
    of_parts, sums = found[: len(parts)], found[len(parts)]
    of_weight = sums[: len(weight)].to(weight.dtype)
    of_bias = None if bias is None else sums[-1].to(bias.dtype)
    return of_weight, of_bias, found[-1] if of_state else None, None, None, *of_parts


def _setup_of_list(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _setup(ctx, (*inputs[:-1], *inputs[-1]), tuple(output))


def _gradients_of_list(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    found = _gradients(ctx, *grads)
    return *found[: -len(grads)], list(found[-len(grads) :])


convolve.register_autograd(_gradients_of_list, setup_context=_setup_of_list)
_convolve = eagerly(_Spread(convolve, before=5), _setup, _gradients)


def refuses(inputs: Parts, weight: Tensor, *_: Any) -> str | None:
    """Why this call cannot be served, or None."""
    for part in inputs:
        if accumulation_dtype(part.dtype) != torch.float32:
            return f"this kernel computes in float32, not in {part.dtype}"
        if (part.shape[1] + 2 * _WIDEST) * part.shape[2] >= 2**31:
            return "a sequence has too many elements for this kernel"
    if weight.shape[0] > _WIDEST:
        return f"this kernel has at most {_WIDEST} taps, not {weight.shape[0]}"
    return None


def declines(*_: Any) -> str | None:
    """Never: it is the best where it can run."""
    return None


def run(
    inputs: Parts, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: tuple[bool, ...]
) -> Parts:
    """The route: one launch, or one for each part where types or activations differ."""
    if len(set(silu)) == 1 and all(part.dtype == inputs[0].dtype for part in inputs):
        return _convolve(weight, bias, state, reset, silu[0], *inputs)
    widths = [part.shape[2] for part in inputs]
    weights, states = weight.split(widths, dim=-1), state.split(widths, dim=-1)
    biases = [None] * len(inputs) if bias is None else bias.split(widths)
    outputs: Parts = ()
    for part, own, own_bias, own_state, activated in zip(inputs, weights, biases, states, silu, strict=True):
        outputs += _convolve(own, own_bias, own_state, reset, activated, part)
    return outputs
