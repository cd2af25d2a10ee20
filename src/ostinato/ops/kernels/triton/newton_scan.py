"""The Triton route of `newton_scan`, for ParaGRU and ParaLSTM by Newton's method.

The channels of these cells never meet, so states can be walked in registers, each from the one before it: the
fixed point of the iteration, to rounding. Where channels are many, in one piece, which reads each input
once; where they are few, in segments of time at once, with Newton's method for the states between segments,
and in one piece if those do not fit together after four iterations. So what is returned is at least as
converged as Newton's method on the whole trajectory after as many iterations as were asked for; `iterations`
and `guess` do not change it. The report counts walks in segments (0 for one piece), and its residual is that
between segments (elsewhere there is none). States that are not finite are a divergence, as everywhere.

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
from ostinato.ops.kernels.triton import newton_scan_adjoint as adjoint
from ostinato.ops.kernels.triton import newton_scan_walk as kernels
from ostinato.ops.kernels.triton.launch import INTERPRETED, card, without_second_derivative
from ostinato.ops.newton_scan import diverged

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
_BLOCK_C = 8 if INTERPRETED else 32
_BLOCK_T = 4 if INTERPRETED else 16
_BLOCK_T_BACK = 4 if INTERPRETED else 8
_SHORTEST_SEGMENT = 8 if INTERPRETED else 256
# Newton's method between segments: how many steps before each its first guess is made from; how often they
# are walked before all is walked in one piece; and how far a state may be from the end of the segment before
# it, relative to the state where that is large.
_LEAD = 8 if INTERPRETED else 128
_WALKS = 4
_TOLERANCE = 5e-7
# Segments that are fewer do not repay their being walked twice.
_FEWEST_SEGMENTS = 2 if INTERPRETED else 4


def segments_of(batch: int, time: int, channels: int, device: torch.device) -> int:
    """Into how many segments time can be cut to fill the card with warps."""
    programs = batch * math.ceil(channels / _BLOCK_C)
    # Eight warps of this size fit a processor at a time; more would wait for a second round.
    wanted = 3 if INTERPRETED else 8 * card(device).processors // programs
    return max(1, min(wanted, time // _SHORTEST_SEGMENT))


def _cut(time: int, segments: int, block: int) -> tuple[int, int]:
    """The number of segments, and their length in whole tiles."""
    length = block * math.ceil(time / (segments * block))
    return math.ceil(time / length), length


def _can_look(tensor: Tensor) -> bool:
    """Whether the device may be waited for: not while its work is being captured."""
    return tensor.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


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
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, cells (empty unless `keep`), the last of both, and (walks, residual, peak) by row."""
    x, a = _rows(inputs), recurrent.contiguous()
    p = a if peephole is None else peephole.contiguous()
    batch, time, _, channels = x.shape
    lstm = cell is not None
    blocks = triton.cdiv(channels, _BLOCK_C)
    segments = segments_of(batch, time, channels, x.device)
    segments, length = _cut(time, segments if segments >= _FEWEST_SEGMENTS else 1, _BLOCK_T)

    def empty(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=torch.float32)

    out = x.new_empty(batch, time, channels)
    cells = empty(batch, time, channels) if lstm and keep else empty(0)
    ends, peak, gap = empty(batch, segments, channels), empty(batch, segments, channels), empty(batch, channels)
    cell_ends = torch.empty_like(ends) if lstm else empty(0)
    start = hidden.float().contiguous()
    start_cell = start if cell is None else cell.float().contiguous()
    done = torch.zeros(batch, blocks, dtype=torch.int32, device=x.device)

    def walk(enters: Tensor, enters_cell: Tensor, products: Tensor, pieces: int, stored: bool = True) -> None:
        kernels.walk[(batch * pieces * blocks,)](
            x,
            a,
            p,
            enters,
            enters_cell,
            _bytes(reset, x),
            out,
            cells if lstm and keep else ends,
            ends if stored else enters,
            (cell_ends if stored else enters_cell) if lstm else ends,
            peak,
            products,
            done,
            gap,
            time,
            channels,
            pieces,
            length if pieces > 1 else time,
            _LEAD,
            segments // pieces,
            *x.stride()[:3],
            channels,
            0,
            LSTM=lstm,
            FRESH=reset is not None,
            STORED=stored,
            KEEP=lstm and keep,
            JOINED=pieces > 1 and stored,
            GUARDED=segments > 1 and stored,
            EVEN_T=time % _BLOCK_T == 0,
            EVEN_C=channels % _BLOCK_C == 0,
            BLOCK_T=_BLOCK_T,
            BLOCK_C=_BLOCK_C,
            num_warps=1,
        )

    fits = False
    if segments > 1:
        enters = torch.zeros_like(ends)
        enters[:, 0] = start
        enters_cell = enters
        if lstm:
            enters_cell = torch.zeros_like(ends)
            enters_cell[:, 0] = start_cell
        products = empty(batch, segments, 4 if lstm else 1, channels)
        walk(enters, enters_cell, products, segments, stored=False)
        for count in range(1, _WALKS + 1):
            walk(enters, enters_cell, products, segments)
            kernels.join[(batch * blocks,)](
                enters,
                enters_cell,
                ends,
                cell_ends if lstm else ends,
                products,
                gap,
                done,
                channels,
                segments,
                count,
                min(tolerance, _TOLERANCE),
                LSTM=lstm,
                BLOCK_C=_BLOCK_C,
                num_warps=1,
            )
            fits = _can_look(x) and bool(done.all())
            if fits:
                break
    if not fits:
        # In one piece: everything, or what does not fit together by now.
        walk(start, start_cell, ends, 1)
    if segments > 1:
        walks = torch.where(done == 0, _WALKS + 1, done).amax(1).float()
        residual = gap.amax(1)
    else:
        walks, residual = torch.zeros(2, batch, device=x.device)
    report = torch.stack([walks, residual, peak.amax((1, 2))], dim=1)
    last = ends[:, -1].contiguous() if segments > 1 else ends.view(batch, channels)
    last_cell = cell_ends[:, -1].clone() if lstm else cell_ends
    return out, cells, last, last_cell, report


@forward.register_fake
def _(
    recurrent: Tensor,
    peephole: Tensor | None,
    inputs: Tensor,
    hidden: Tensor,
    cell: Tensor | None,
    reset: Tensor | None,
    keep: bool,
    tolerance: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, _, channels = inputs.shape
    lstm = cell is not None
    last = inputs.new_empty(batch, channels, dtype=torch.float32)
    return (
        inputs.new_empty(batch, time, channels),
        inputs.new_empty((batch, time, channels) if lstm and keep else (0,), dtype=torch.float32),
        last,
        torch.empty_like(last) if lstm else last.new_empty(0),
        last.new_empty(batch, 3),
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
    segments, length = _cut(time, segments_of(batch, time, channels, x.device), _BLOCK_T_BACK)
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
        adjoint.walk_back[(batch * segments * blocks,)](
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
            channels,
            0,
            LSTM=lstm,
            FRESH=reset is not None,
            TOTALS=totals,
            EVEN_T=time % _BLOCK_T_BACK == 0,
            EVEN_C=channels % _BLOCK_C == 0,
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
        adjoint.between[(batch * blocks,)](
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
    recurrent, peephole, x, hidden, cell, reset, *_ = inputs
    ctx.save_for_backward(recurrent, peephole, x, hidden, cell, reset, output[0], output[1])


def _backward(
    ctx: Any, grad: Tensor, _cells: Tensor, grad_last: Tensor, grad_last_cell: Tensor, _report: Tensor
) -> tuple[Tensor | None, ...]:
    recurrent, peephole, x, hidden, cell, reset, states, cells = ctx.saved_tensors
    ga, gp, gx, gh, gc = backward(
        grad, grad_last, grad_last_cell, recurrent, peephole, x, hidden, cell, reset, states, cells
    )
    return ga, None if peephole is None else gp, gx, gh, None if cell is None else gc, None, None, None


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
    outputs, _, last, last_cell, found = forward(
        weights[0], weights[1] if lstm else None, inputs, hidden, memory, reset, keep, settings.tolerance
    )
    walks, residual, peak = found.detach().unbind(1)
    good = torch.isfinite(peak)
    residual = torch.where(good, residual, torch.nan)
    if settings.check:
        if torch.compiler.is_compiling():
            outputs = torch.where(good.view(-1, 1, 1), outputs, torch.nan)
            last = torch.where(good.view(-1, 1), last, torch.nan)
            last_cell = torch.where(good.view(-1, 1), last_cell, torch.nan) if lstm else last_cell
        elif not bool(good.all()):
            raise diverged(cell, settings, int(walks.max()), float(residual.max()))
    report = torch.stack([walks, residual, peak, good.to(peak.dtype)], dim=1)
    return outputs, ChannelCellHidden(last_cell, last) if lstm else ChannelHidden(last), report
