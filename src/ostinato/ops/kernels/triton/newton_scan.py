"""The Triton route of `newton_scan`, for ParaGRU and ParaLSTM by Newton's method.

The channels of these cells never meet, so one launch solves all of them with the state in registers and
reads each input once. What it returns is at least as converged as Newton's method on the whole trajectory
after as many iterations: the states are walked in order, each from the one before it as it is kept, which
is the fixed point of the iteration. The report then counts no iteration, and a residual of zero; states
that are not finite are reported as a divergence, as everywhere.

The derivative is the implicit one: one linear recurrence backwards, fused with the pull-back of the step to
inputs and weights. Gradients of weights are summed per program and then over programs: deterministic.
Differentiable once. Half precision is computed in float32.

Source: ParaRNN (arXiv 2510.21450), sections 2 and 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ostinato.ops.cells import ChannelCellHidden, ChannelHidden, ParaGRU, ParaLSTM
from ostinato.ops.kernels.triton import newton_scan_walk as kernels
from ostinato.ops.kernels.triton.launch import INTERPRETED, card, without_second_derivative

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_FEW_ITERATIONS = 3


def refuses(cell: Any, weights: Any, inputs: Any, state: Any, reset: Tensor | None, settings: Any) -> str | None:
    """Why the kernels cannot serve a call."""
    if type(cell) not in (ParaGRU, ParaLSTM):
        return f"the kernels know ParaGRU and ParaLSTM, not {type(cell).__name__}"
    if settings.method != "newton" or settings.step_size != 1:
        return "the kernels know Newton's method, undamped"
    if inputs.ndim != 4:
        return f"the kernels take inputs (batch, time, 3, channels), not of {inputs.ndim} axes"
    for tensor in (*weights, inputs, *(state or ())):
        if tensor.dtype not in _TYPES:
            return f"the kernels take float32, bfloat16 and float16, not {tensor.dtype}"
    return None


def declines(cell: Any, weights: Any, inputs: Any, state: Any, reset: Tensor | None, settings: Any) -> str | None:
    """Why another route had better serve it."""
    if inputs.shape[1] == 1:
        return "a single step needs no solver"
    if settings.iterations is not None and settings.iterations < _FEW_ITERATIONS:
        return "so few iterations ask for an iterate rather than for the solution"
    return None


# Lanes and steps of a tile. Interpreted, small ones, so that tests see the edges.
_BLOCK_C = 4 if INTERPRETED else 32
_BLOCK_T = 4 if INTERPRETED else 16
_BLOCK_T_BACK = 4 if INTERPRETED else 8


def segments_of(batch: int, time: int, channels: int, device: torch.device) -> tuple[int, int]:
    """Into how many segments, of what length, the adjoint cuts time: enough to fill the card with warps."""
    programs = batch * math.ceil(channels / _BLOCK_C)
    # Eight warps of this size fit a processor at a time; more would wait for a second round.
    wanted = 3 if INTERPRETED else 8 * card(device).processors // programs
    shortest = 16 if INTERPRETED else 256
    segments = max(1, min(wanted, time // shortest))
    length = _BLOCK_T_BACK * math.ceil(time / (segments * _BLOCK_T_BACK))
    return math.ceil(time / length), length


def _bytes(mask: Tensor | None, instead: Tensor) -> Tensor:
    return instead if mask is None else mask.contiguous().view(torch.uint8)


def _rows(inputs: Tensor) -> Tensor:
    return inputs if inputs.stride(3) == 1 else inputs.contiguous()


@torch.library.custom_op("ostinato::newton_scan", mutates_args=())
def forward(
    recurrent: Tensor,
    peephole: Tensor | None,
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, cells (empty unless `keep`), the last of both, and max |state| by channel or NaN."""
    x, a = _rows(inputs), recurrent.contiguous()
    p = a if peephole is None else peephole.contiguous()
    batch, time, _, channels = x.shape
    lstm = cell is not None
    out = x.new_empty(batch, time, channels)
    cells = x.new_empty((batch, time, channels) if lstm and keep else (0,), dtype=torch.float32)
    last = x.new_empty(batch, channels, dtype=torch.float32)
    last_cell = torch.empty_like(last) if lstm else last.new_empty(0)
    peak = torch.empty_like(last)
    h = hidden.contiguous()
    kernels.walk[(batch * triton.cdiv(channels, _BLOCK_C),)](
        x,
        a,
        p,
        h,
        h if cell is None else cell.contiguous(),
        _bytes(reset, x),
        out,
        cells if lstm and keep else last,
        last,
        last_cell if lstm else last,
        peak,
        time,
        channels,
        *x.stride()[:3],
        0,
        LSTM=lstm,
        FRESH=reset is not None,
        KEEP=lstm and keep,
        EVEN=time % _BLOCK_T == 0,
        BLOCK_T=_BLOCK_T,
        BLOCK_C=_BLOCK_C,
        num_warps=1,
    )
    return out, cells, last, last_cell, peak


@forward.register_fake
def _(
    recurrent: Tensor,
    peephole: Tensor | None,
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, _, channels = inputs.shape
    lstm = cell is not None
    last = inputs.new_empty(batch, channels, dtype=torch.float32)
    return (
        inputs.new_empty(batch, time, channels),
        inputs.new_empty((batch, time, channels) if lstm and keep else (0,), dtype=torch.float32),
        last,
        torch.empty_like(last) if lstm else last.new_empty(0),
        torch.empty_like(last),
    )


@torch.library.custom_op("ostinato::newton_scan_backward", mutates_args=())
def backward(
    grad: Tensor,
    grad_last: Tensor,
    grad_last_cell: Tensor,
    recurrent: Tensor,
    peephole: Tensor | None,
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    reset: Tensor | None,
    states: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the recurrent weights, the peepholes, the inputs, and the initial hidden state and cell."""
    x, a, g = _rows(inputs), recurrent.contiguous(), grad.contiguous()
    p = a if peephole is None else peephole.contiguous()
    batch, time, _, channels = x.shape
    lstm = cell is not None
    h = hidden.contiguous()
    c = h if cell is None else cell.contiguous()
    parts, kinds = (5, 2) if lstm else (3, 1)
    segments, length = segments_of(batch, time, channels, x.device)
    blocks = triton.cdiv(channels, _BLOCK_C)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=torch.float32)

    end_h, end_c = grad_last.float().contiguous(), grad_last_cell.float().contiguous() if lstm else grad_last
    mu_h, mu_c = end_h, end_c
    grad_x = x.new_empty(batch, time, 3, channels)
    sums = empty(batch, segments, parts, channels)
    grad_h = empty(batch, channels)
    grad_c = empty(batch, channels) if lstm else grad_h.new_empty(0)

    def launch(ends: Tensor, products: Tensor, totals: bool) -> None:
        kernels.walk_back[(batch * segments * blocks,)](
            x,
            a,
            p,
            h,
            c,
            _bytes(reset, x),
            states,
            cells if lstm else states,
            g,
            mu_h,
            mu_c if lstm else mu_h,
            grad_x,
            sums,
            ends,
            grad_c if lstm else grad_h,
            products,
            time,
            channels,
            segments,
            length,
            *x.stride()[:3],
            0,
            LSTM=lstm,
            FRESH=reset is not None,
            TOTALS=totals,
            BLOCK_T=_BLOCK_T_BACK,
            BLOCK_C=_BLOCK_C,
            num_warps=1,
        )

    if segments > 1:
        ends = empty(batch, segments, kinds, channels)
        products = empty(batch, segments, kinds * kinds, channels)
        mu_h = x.new_zeros(batch, segments, channels, dtype=torch.float32)
        mu_c = mu_h
        launch(ends, products, True)
        mu_h = torch.empty_like(mu_h)
        mu_c = torch.empty_like(mu_h) if lstm else mu_h
        kernels.between[(batch * blocks,)](
            products,
            ends,
            mu_h,
            mu_c,
            end_h,
            end_c,
            channels,
            segments,
            LSTM=lstm,
            BLOCK_C=_BLOCK_C,
            num_warps=1,
        )
    launch(grad_h, grad_h, False)
    return (
        sums[:, :, :3].sum((0, 1)).to(recurrent.dtype),
        sums[:, :, 3:].sum((0, 1)).to((recurrent if peephole is None else peephole).dtype),
        grad_x,
        grad_h.to(hidden.dtype),
        grad_c if cell is None else grad_c.to(cell.dtype),
    )


@backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor,
    grad_last_cell: Tensor,
    recurrent: Tensor,
    peephole: Tensor | None,
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    reset: Tensor | None,
    states: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        recurrent.new_empty(recurrent.shape),
        recurrent.new_empty(0, recurrent.shape[1]) if peephole is None else peephole.new_empty(peephole.shape),
        inputs.new_empty(inputs.shape),
        hidden.new_empty(hidden.shape),
        hidden.new_empty(0, dtype=torch.float32) if cell is None else cell.new_empty(cell.shape),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    recurrent, peephole, x, hidden, cell, reset, _ = inputs
    ctx.save_for_backward(recurrent, peephole, x, hidden, cell, reset, output[0], output[1])


def _backward(
    ctx: Any, grad: Tensor, _cells: Tensor, grad_last: Tensor, grad_last_cell: Tensor, _peak: Tensor
) -> tuple[Tensor | None, ...]:
    recurrent, peephole, x, hidden, cell, reset, states, cells = ctx.saved_tensors
    ga, gp, gx, gh, gc = backward(
        grad, grad_last, grad_last_cell, recurrent, peephole, x, hidden, cell, reset, states, cells
    )
    return ga, None if peephole is None else gp, gx, gh, None if cell is None else gc, None, None


forward.register_autograd(_backward, setup_context=_setup)
without_second_derivative(backward)


def run(
    cell: Any, weights: Any, inputs: Tensor, state: Any, reset: Tensor | None, settings: Any
) -> tuple[Tensor, Any, Tensor]:
    """What the engine's routes compute: outputs, the last state, and the report's four numbers by row."""
    lstm = isinstance(cell, ParaLSTM)
    if state is None:
        state = cell.initial_state(inputs[:, 0].float())
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, inputs, *state))
    hidden, memory = (state.hidden, state.cell) if lstm else (state.hidden, None)
    outputs, _, last, last_cell, peak = forward(
        weights[0], weights[1] if lstm else None, inputs, hidden, memory, reset, keep
    )
    peak = peak.detach().amax(1)
    good = torch.isfinite(peak)
    nothing = torch.zeros_like(peak)
    report = torch.stack([nothing, torch.where(good, 0.0, torch.nan), peak, good.to(peak.dtype)], dim=1)
    return outputs, ChannelCellHidden(last_cell, last) if lstm else ChannelHidden(last), report
