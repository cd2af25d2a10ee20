"""`short_convolution` in Triton: one pass over the inputs forward, one over inputs and gradient backward.

Where silu follows, it is taken on the way out, and what went into it is kept for the backward pass.

A program owns a tile of steps and channels; the taps' shifted reads of one tile come from the cache. The gradients of
weight and bias are summed tile by tile, and the tiles by PyTorch: in the same order every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.checks import accumulation_dtype
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import without_second_derivative

_STEPS, _CHANNELS, _WARPS, _WIDEST = 64, 64, 8, 16
Parts = tuple[Tensor, ...]


@triton.jit
def load_inputs(inputs, state, state_row, step, channel, channels, inside, PAST: tl.constexpr):
    """x of one sequence at a column of steps, those before the first from its state; `inside` masks what is read."""
    here = inputs + step[:, None] * channels + channel[None, :]
    x = tl.load(here, mask=inside & (step >= 0)[:, None], other=0.0).to(tl.float32)
    if PAST > 0 and tl.program_id(0) == 0:  # only the first tile sees the state
        early = state + (step + PAST)[:, None] * state_row + channel[None, :]
        x += tl.load(early, mask=inside & (step < 0)[:, None], other=0.0).to(tl.float32)
    return x


@triton.jit
def _forward(
    inputs, weight, bias, state, reset, outputs, kept, time, channels, weight_row, state_batch, state_row,
    WIDTH: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr, SILU: tl.constexpr, KEEP: tl.constexpr,
    STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # Within a sequence 32 bits address everything (`refuses` sees to it); between sequences they might not.
    batch = tl.program_id(2).to(tl.int64)
    inputs += batch * time * channels
    outputs += batch * time * channels
    state += batch * state_batch
    step = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    there, wide = step < time, channel < channels
    inside = there[:, None] & wide[None, :]
    total = tl.zeros((STEPS, CHANNELS), tl.float32)
    if BIAS:
        total += tl.load(bias + channel, mask=wide, other=0.0).to(tl.float32)[None, :]
    same = there
    for lag in tl.static_range(WIDTH):
        if RESET and lag > 0:
            new = tl.load(reset + batch * time + step - lag + 1, mask=there & (step - lag + 1 >= 0), other=0)
            same = same & (new == 0)
        x = load_inputs(inputs, state, state_row, step - lag, channel, channels, inside & same[:, None], WIDTH - 1)
        total += x * tl.load(weight + lag * weight_row + channel, mask=wide, other=0.0).to(tl.float32)[None, :]
    place = step[:, None] * channels + channel[None, :]
    if KEEP:
        tl.store(kept + batch * time * channels + place, total, mask=inside)
    if SILU:
        total = total * tl.sigmoid(total)
    tl.store(outputs + place, total, mask=inside)


@triton.jit
def _backward(
    grad, kept, inputs, weight, state, reset, grad_inputs, grad_state, partial, time, channels, tiles,
    weight_row, state_batch, state_row,
    WIDTH: tl.constexpr, RESET: tl.constexpr, SILU: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # The tile's steps start at −(WIDTH − 1): those below 0 are the state's.
    PAST: tl.constexpr = WIDTH - 1
    batch = tl.program_id(2).to(tl.int64)
    grad += batch * time * channels
    inputs += batch * time * channels
    grad_inputs += batch * time * channels
    state += batch * state_batch
    if SILU:
        kept += batch * time * channels
    grad_state += batch * PAST * channels
    step = tl.program_id(0) * STEPS + tl.arange(0, STEPS) - PAST
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    wide = channel < channels
    x = load_inputs(inputs, state, state_row, step, channel, channels, (step < time)[:, None] & wide[None, :], PAST)
    total = tl.zeros((STEPS, CHANNELS), tl.float32)
    row = ((batch * tiles + tl.program_id(0)) * (WIDTH + 1)) * channels + channel
    same = step < time
    for lag in tl.static_range(WIDTH):
        later = step + lag
        there = (later >= 0) & (later < time)
        if RESET and lag > 0:
            new = tl.load(reset + batch * time + later, mask=there, other=0)
            same = same & (new == 0)
        mask = (there & same)[:, None] & wide[None, :]
        there_too = later[:, None] * channels + channel[None, :]
        dy = tl.load(grad + there_too, mask=mask, other=0.0).to(tl.float32)
        if SILU:
            z = tl.load(kept + there_too, mask=mask, other=0.0).to(tl.float32)
            share = tl.sigmoid(z)
            dy = dy * share * (1 + z * (1 - share))
        total += dy * tl.load(weight + lag * weight_row + channel, mask=wide, other=0.0).to(tl.float32)[None, :]
        tl.store(partial + row + lag * channels, tl.sum(dy * x, axis=0), mask=wide)
        if lag == 0:
            tl.store(partial + row + WIDTH * channels, tl.sum(dy, axis=0), mask=wide)
    here = grad_inputs + step[:, None] * channels + channel[None, :]
    tl.store(here, total, mask=((step >= 0) & (step < time))[:, None] & wide[None, :])
    if PAST > 0 and tl.program_id(0) == 0:
        before = grad_state + (step + PAST)[:, None] * channels + channel[None, :]
        tl.store(before, total, mask=(step < 0)[:, None] & wide[None, :])


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, with its last axis contiguous: slices of channels are read where they stand."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _forward_outputs(inputs: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """Room for the outputs, and for what is kept: nothing, if not."""
    outputs = torch.empty_like(inputs, memory_format=torch.contiguous_format)
    return outputs, torch.empty_like(outputs) if keep else outputs.new_empty(0)


@torch.library.custom_op("ostinato::short_convolution", mutates_args=())
def convolve(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    """y of `short_convolution`, or silu(y); and y if it is to be kept, else nothing."""
    batch, time, channels = inputs.shape
    outputs, kept = _forward_outputs(inputs, keep)
    weight, state = _rows(weight), _rows(state)
    _forward[(triton.cdiv(time, _STEPS), triton.cdiv(channels, _CHANNELS), batch)](
        inputs.contiguous(), weight, None if bias is None else bias.contiguous(), state,
        None if reset is None else reset.contiguous(), outputs, kept, time, channels,
        weight.stride(0), state.stride(0), state.stride(1),
        WIDTH=weight.shape[0], BIAS=bias is not None, RESET=reset is not None, SILU=silu, KEEP=keep,
        STEPS=_STEPS, CHANNELS=_CHANNELS, num_warps=_WARPS,
    )  # fmt: skip
    return outputs, kept


@convolve.register_fake
def _(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, reset: Tensor | None, silu: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    return _forward_outputs(inputs, keep)


def _backward_outputs(inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    like = torch.contiguous_format
    return torch.empty_like(inputs, memory_format=like), torch.empty_like(state, memory_format=like)


@torch.library.custom_op("ostinato::short_convolution_backward", mutates_args=())
def convolve_backward(
    grad: Tensor, kept: Tensor | None, inputs: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of inputs, state, and of weight with the bias below it (width + 1, channels)."""
    batch, time, channels = inputs.shape
    width = weight.shape[0]
    tiles = triton.cdiv(time + width - 1, _STEPS)
    grad_inputs, grad_state = _backward_outputs(inputs, state)
    partial = torch.empty(batch * tiles, width + 1, channels, dtype=torch.float32, device=inputs.device)
    weight, state = _rows(weight), _rows(state)
    _backward[(tiles, triton.cdiv(channels, _CHANNELS), batch)](
        grad.contiguous(), kept, inputs.contiguous(), weight, state, None if reset is None else reset.contiguous(),
        grad_inputs, grad_state, partial, time, channels, tiles, weight.stride(0), state.stride(0), state.stride(1),
        WIDTH=width, RESET=reset is not None, SILU=kept is not None, STEPS=_STEPS, CHANNELS=_CHANNELS, num_warps=_WARPS,
    )  # fmt: skip
    return grad_inputs, grad_state, partial.sum(0)


@convolve_backward.register_fake
def _(
    grad: Tensor, kept: Tensor | None, inputs: Tensor, weight: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    width, channels = weight.shape
    rows = torch.empty(width + 1, channels, dtype=torch.float32, device=inputs.device)
    return *_backward_outputs(inputs, state), rows


without_second_derivative(convolve_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, state, reset, _, keep = inputs
    ctx.save_for_backward(x, weight, state, reset, output[1] if keep else None)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, state, reset, kept = ctx.saved_tensors
    grad_x, grad_state, rows = call_once(convolve_backward, grad, kept, x, weight, state, reset)
    grad_bias = None if ctx.bias_dtype is None else rows[-1].to(ctx.bias_dtype)
    return grad_x, rows[:-1].to(weight.dtype), grad_bias, grad_state, None, None, None


convolve.register_autograd(_gradients, setup_context=_setup)
_convolve = eagerly(convolve, _setup, _gradients)


def refuses(inputs: Parts, weight: Tensor, *_: Any) -> str | None:
    """Why this call cannot be served, or None."""
    for part in inputs:
        if accumulation_dtype(part.dtype) != torch.float32:
            return f"this kernel computes in float32, not in {part.dtype}"
        if (part.shape[1] + _STEPS) * part.shape[2] >= 2**31:
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
    """The route: part by part, each with its channels of the weight and the state."""
    widths = [part.shape[-1] for part in inputs]
    weights, states = weight.split(widths, dim=-1), state.split(widths, dim=-1)
    biases = [None] * len(inputs) if bias is None else bias.split(widths)
    outputs = []
    for part, own, own_bias, own_state, activated in zip(inputs, weights, biases, states, silu, strict=True):
        # What goes into silu is only kept where there may be a backward pass.
        keep = activated and torch.is_grad_enabled()
        outputs.append(_convolve(part, own, own_bias, own_state, reset, activated, keep)[0])
    return tuple(outputs)
