"""`projections_step` in Triton: several maps of one norm of x, and the short convolution behind them, in one launch.

A program owns some rows of one of the weights. A row is a channel of the convolution, so the same program has all
that the channel's window needs: it shifts it in place.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ostinato.ops.kernels.triton.launch import cdiv, power_of_two
from ostinato.ops.kernels.triton.step_parts import (
    begin,
    dependent,
    entering,
    refusal,
    rows_of,
    rows_times,
    tile,
    unfit,
)


@triton.jit
def _projections(
    x, norm, weights, taps, bias, window, outputs, x_row, taps_row, window_batch, window_row, eps,
    INPUTS: tl.constexpr, STARTS: tl.constexpr, COLUMNS: tl.constexpr, SILU: tl.constexpr, CONVOLVED: tl.constexpr,
    PAST: tl.constexpr, NORM: tl.constexpr, BIAS: tl.constexpr, DEPENDENT: tl.constexpr,
    BATCH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    # The map of this program: its weight, its columns of the outputs, whether silu follows.
    program = tl.program_id(0)
    weight, start, low, high, activated = weights[0], 0, 0, COLUMNS[1], SILU[0]
    for i in tl.static_range(1, len(STARTS)):
        if program >= STARTS[i]:
            weight, start, low, high, activated = weights[i], STARTS[i], COLUMNS[i], COLUMNS[i + 1], SILU[i]
    row = (program - start) * ROWS + tl.arange(0, ROWS)
    element = tl.arange(0, D)
    column = low + row
    there, inside = column < high, (element < INPUTS)[None, :]
    place = element[None, :]
    cell = row[:, None, None] * INPUTS + place[None, :, :]
    matrix = tl.load(weight + cell, mask=there[:, None, None] & inside[None, :, :], other=0.0)
    scale = element.to(tl.float32)
    if NORM:
        scale = tl.load(norm + element, mask=element < INPUTS, other=0.0).to(tl.float32)
    convolved = there & (column < CONVOLVED)
    if CONVOLVED > 0:
        # All of the window is read before any of it is written: lags along the first axis, the oldest input first.
        lag = PAST - tl.arange(0, P)
        past = convolved[None, :] & (lag > 0)[:, None]
        tap = tl.load(taps + lag[:, None] * taps_row + column[None, :], mask=past, other=0.0).to(tl.float32)
        newest = tl.load(taps + column, mask=convolved, other=0.0).to(tl.float32)
        offset = tl.zeros((ROWS,), tl.float32)
        if BIAS:
            offset = tl.load(bias + column, mask=convolved, other=0.0).to(tl.float32)
        here = window + (PAST - lag)[:, None] * window_row + column[None, :]
        held = tl.load(here, mask=past, other=0.0)
    begin(DEPENDENT)
    for batch in tl.static_range(BATCH):
        z = entering(x + batch * x_row, x, scale, place, inside, INPUTS, eps, NORM, False, False, False)
        z = z.to(weight.dtype.element_ty).to(tl.float32)
        y = rows_times(matrix, z).to(outputs.dtype.element_ty).to(tl.float32)
        if CONVOLVED > 0:
            if batch > 0:
                held = tl.load(here + batch * window_batch, mask=past, other=0.0)
            earlier = tl.sum(held.to(tl.float32) * tap, axis=0) + offset
            tl.debug_barrier()
            tl.store(here + batch * window_batch - window_row, held, mask=past & (lag < PAST)[:, None])
            if PAST > 0:
                last = window + batch * window_batch + (PAST - 1) * window_row + column
                tl.store(last, y, mask=convolved)
            y = tl.where(convolved, y * newest + earlier, y)
        y = tl.where(activated, y * tl.sigmoid(y), y)
        tl.store(outputs + batch * COLUMNS[len(STARTS)] + column, y, mask=there)


def refuses(
    x: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    taps: Tensor | None,
    bias: Tensor | None,
    window: Tensor | None,
    *_: object,
) -> str | None:
    """Why this call cannot be served, or None."""
    if reason := refusal((x, weights, norm, taps, bias, window), x) or unfit(weights):
        return reason
    if any(tensor is not None and tensor.stride(-1) != 1 for tensor in (taps, window)):
        return "the convolution's weight or window is not contiguous"
    return None


def declines(*_: object) -> str | None:
    """Never: it is the best where it can run."""
    return None


def run(
    x: Tensor,
    weights: tuple[Tensor, ...],
    norm: Tensor | None,
    taps: Tensor | None,
    bias: Tensor | None,
    window: Tensor | None,
    eps: float,
    silu: tuple[bool, ...],
) -> tuple[Tensor, ...]:
    """The route: the outputs are columns of one tensor."""
    batch, inputs = x.shape
    widths = [len(weight) for weight in weights]
    columns = (0, *accumulate(widths))
    rows, warps = tile(columns[-1], inputs, weights[0].element_size())
    programs = (0, *accumulate(cdiv(width, rows) for width in widths))
    outputs = torch.empty(batch, columns[-1], dtype=weights[0].dtype, device=x.device)
    x = rows_of(x)
    _projections[(programs[-1],)](
        x, None if norm is None else norm.contiguous(), tuple(weights), taps, bias, window, outputs, x.stride(0),
        0 if taps is None else taps.stride(0), *((0, 0) if window is None else window.stride()[:2]), eps,
        INPUTS=inputs, STARTS=programs[:-1], COLUMNS=columns, SILU=tuple(silu),
        CONVOLVED=0 if taps is None else taps.shape[1], PAST=0 if taps is None else len(taps) - 1,
        NORM=norm is not None, BIAS=bias is not None, BATCH=batch, ROWS=rows, D=power_of_two(inputs),
        P=1 if taps is None else power_of_two(max(len(taps) - 1, 1)), num_warps=warps, **dependent(x.device),
    )  # fmt: skip
    return outputs.split(widths, dim=-1)
