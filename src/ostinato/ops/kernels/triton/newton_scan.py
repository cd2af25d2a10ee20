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
from torch import Tensor

from ostinato.ops.cells import ChannelCellHidden, ChannelHidden, ParaGRU, ParaLSTM
from ostinato.ops.kernels.triton import newton_scan_adjoint as adjoint
from ostinato.ops.kernels.triton import newton_scan_walk as kernels
from ostinato.ops.kernels.triton.eager import call_once, eagerly
from ostinato.ops.kernels.triton.launch import INTERPRETED, card, cdiv, without_second_derivative
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
# What is shorter, or cut into fewer segments, is walked in one piece: it takes less time than the launches.
_LONG = 16 if INTERPRETED else 8192
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


def _pieces(inputs: Tensor) -> tuple[int, int]:
    """The number and the length of the segments in which these inputs are walked: one, or enough to repay it."""
    batch, time, _, channels = inputs.shape
    segments = segments_of(batch, time, channels, inputs.device)
    return _cut(time, segments if time >= _LONG and segments >= _FEWEST_SEGMENTS else 1, _BLOCK_T)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, cells (empty unless `keep`), the last of both, and how it went.

    That is: the largest |state| by segment and channel, NaN where one is; and, nothing for one piece, the residual
    between segments by channel, and by block of channels in how many walks it fell under `tolerance`, or 0.
    """
    x, a = _rows(inputs), recurrent.contiguous()
    p = a if peephole is None else peephole.contiguous()
    batch, time, _, channels = x.shape
    lstm = cell is not None
    blocks = cdiv(channels, _BLOCK_C)
    segments, length = _pieces(inputs)
    joined = segments > 1

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    out = x.new_empty(batch, time, channels)
    cells = empty(batch, time, channels) if lstm and keep else empty(0)
    # The states that leave the segments, and the largest.
    ends, peak = empty(batch, segments, channels), empty(batch, segments, channels)
    cell_ends = torch.empty_like(ends) if lstm else empty(0)
    gap = empty(batch, channels) if joined else empty(0)
    done = (
        torch.zeros(batch, blocks, dtype=torch.int32, device=x.device) if joined else x.new_empty(0, dtype=torch.int32)
    )
    start = hidden.contiguous()
    start_cell = start if cell is None else cell.contiguous()

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
            done if joined else ends,
            gap if joined else ends,
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
            GUARDED=joined and stored,
            EVEN_T=time % _BLOCK_T == 0,
            EVEN_C=channels % _BLOCK_C == 0,
            BLOCK_T=_BLOCK_T,
            BLOCK_C=_BLOCK_C,
            num_warps=1,
        )

    fits = False
    if joined:
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
    last = ends[:, -1].contiguous() if joined else ends.view(batch, channels)
    last_cell = cell_ends[:, -1:].reshape(batch, channels) if lstm else cell_ends
    return out, cells, last, last_cell, peak, gap, done


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, time, _, channels = inputs.shape
    lstm = cell is not None
    segments, _ = _pieces(inputs)
    joined = segments > 1

    def empty(*shape: int) -> Tensor:
        return inputs.new_empty(shape, dtype=torch.float32)

    done = (batch, cdiv(channels, _BLOCK_C)) if joined else (0,)
    return (
        inputs.new_empty(batch, time, channels),
        empty(batch, time, channels) if lstm and keep else empty(0),
        empty(batch, channels),
        empty(batch, channels) if lstm else empty(0),
        empty(batch, segments, channels),
        empty(batch, channels) if joined else empty(0),
        inputs.new_empty(done, dtype=torch.int32),
    )


@torch.library.custom_op("ostinato::newton_scan_backward", mutates_args=())
def backward(
    grad: Tensor,
    grad_last: Tensor | None,
    grad_last_cell: Tensor | None,
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

    def empty(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    def given(gradient: Tensor | None) -> Tensor:
        return empty(batch, channels).zero_() if gradient is None else gradient.float().contiguous()

    end_h = given(grad_last)
    end_c = given(grad_last_cell) if lstm else end_h
    grad_x = x.new_empty(batch, time, 3, channels)
    sums = empty(batch, segments, parts, channels)
    grad_h = empty(batch, channels)
    grad_c = empty(batch, channels) if lstm else empty(0)
    blocks = cdiv(channels, _BLOCK_C)

    def launch(mu_h: Tensor, mu_c: Tensor, ends: Tensor, products: Tensor, totals: bool) -> None:
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
            mu_c,
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

    mu_h, mu_c = end_h, end_c
    if segments > 1:
        ends = empty(batch, segments, kinds, channels)
        products = empty(batch, segments, kinds * kinds, channels)
        mu_h = empty(batch, segments, channels).zero_()
        launch(mu_h, mu_h, ends, products, True)
        # Nothing reads the zeros any more.
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
    launch(mu_h, mu_c, grad_h, grad_h, False)
    return (
        sums[:, :, :3].sum((0, 1)).to(recurrent.dtype),
        (sums[:, :, 3:].sum((0, 1)) if lstm else empty(0, channels)).to(
            (recurrent if peephole is None else peephole).dtype
        ),
        grad_x,
        grad_h.to(hidden.dtype),
        grad_c if cell is None else grad_c.to(cell.dtype),
    )


@backward.register_fake
def _(
    grad: Tensor,
    grad_last: Tensor | None,
    grad_last_cell: Tensor | None,
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
    states, cells, _, last_cell, *report = output
    ctx.mark_non_differentiable(cells, *report, *(() if cell is not None else (last_cell,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(recurrent, peephole, x, hidden, cell, reset, states, cells)


def _backward(
    ctx: Any, grad: Tensor | None, _: Any, grad_last: Tensor | None, grad_last_cell: Tensor | None, *_report: Any
) -> tuple[Tensor | None, ...]:
    recurrent, peephole, x, hidden, cell, reset, states, cells = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(states)
    ga, gp, gx, gh, gc = call_once(
        backward, grad, grad_last, grad_last_cell, recurrent, peephole, x, hidden, cell, reset, states, cells
    )
    return ga, None if peephole is None else gp, gx, gh, None if cell is None else gc, None, None, None


forward.register_autograd(_backward, setup_context=_setup)
without_second_derivative(backward)
_forward = eagerly(forward, _setup, _backward)


def run(
    cell: Any, weights: Any, inputs: Tensor, state: Any, reset: Tensor | None, settings: Any
) -> tuple[Tensor, Any, Any]:
    """What the engine's routes compute: outputs, the last state, and a function that makes the report."""
    lstm = isinstance(cell, ParaLSTM)
    if state is None:
        batch, _, _, channels = inputs.shape
        zeros = inputs.new_zeros(batch, channels, dtype=torch.float32)
        state = ChannelCellHidden(zeros, zeros) if lstm else ChannelHidden(zeros)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, inputs, *state))
    hidden, memory = (state.hidden, state.cell) if lstm else (state.hidden, None)
    outputs, _, last, last_cell, peak, gap, done = _forward(
        weights[0], weights[1] if lstm else None, inputs, hidden, memory, reset, keep, settings.tolerance
    )

    def report() -> Tensor:
        """(iterations, residual, peak, converged) by row."""
        largest = peak.amax((1, 2))
        good = torch.isfinite(largest)
        walks, residual = torch.zeros_like(largest), torch.zeros_like(largest)
        if done.numel():
            walks, residual = torch.where(done == 0, _WALKS + 1, done).amax(1).float(), gap.amax(1)
        return torch.stack([walks, torch.where(good, residual, torch.nan), largest, good.float()], dim=1)

    if settings.check:
        if torch.compiler.is_compiling():
            good = torch.isfinite(peak.amax((1, 2))).view(-1, 1)
            outputs = torch.where(good.unsqueeze(-1), outputs, torch.nan)
            last = torch.where(good, last, torch.nan)
            last_cell = torch.where(good, last_cell, torch.nan) if lstm else last_cell
        elif not math.isfinite(peak.amax().item()):
            walks, residual, *_ = report().amax(0).tolist()
            raise diverged(cell, settings, int(walks), residual)
    return outputs, ChannelCellHidden(last_cell, last) if lstm else ChannelHidden(last), report
