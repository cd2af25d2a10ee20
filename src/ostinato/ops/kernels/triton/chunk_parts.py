"""Parts of the chunked kernels: tiles of sequences, log-decays and resets inside a chunk.

Sequences are (batch, time, heads, dim) with the last axis contiguous; a pointer handed to these functions points to
the first step of one batch and one head. What lies outside (past the end, or past the last column) loads as zero.

Numbers: a log-decay below `FORGETS` counts as `FORGETS`, whose exponential is zero in float32, so that sums over a
chunk stay finite. A reset's own log-decay counts as zero, and pairs of steps on both sides of it are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

FORGETS = tl.constexpr(-104.0)
"""e to this is less than half of float32's least positive number."""


@triton.jit
def load_tile(base, start, stride, time, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The steps start … start + ROWS − 1 of a sequence, columns from `column`: (ROWS, COLUMNS)."""
    row = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    pointers = base + start.to(tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    mask = (row < time - start)[:, None]
    if WIDTH % COLUMNS != 0:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(base, start, stride, time, column, tile, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The inverse of `load_tile`; rounds to the type of `base`."""
    row = tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    pointers = base + start.to(tl.int64) * stride + (row[:, None] * stride + columns[None, :])
    mask = (row < time - start)[:, None]
    if WIDTH % COLUMNS != 0:
        mask = mask & (columns < WIDTH)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_steps(base, start, stride, time, ROWS: tl.constexpr):
    """One number a step, as it is stored: (ROWS,)."""
    row = tl.arange(0, ROWS)
    return tl.load(base + start.to(tl.int64) * stride + row * stride, mask=row < time - start, other=0)


@triton.jit
def load_log_decay(base, start, stride, time, ROWS: tl.constexpr):
    """One log-decay a step, in float32 and bounded: (ROWS,)."""
    return tl.maximum(load_steps(base, start, stride, time, ROWS).to(tl.float32), FORGETS)


@triton.jit
def pair_log_decay(log_decay, total, ROWS: tl.constexpr, EXACT: tl.constexpr):
    """Σ_{j < s ≤ i} g_s at (j, i): (ROWS, ROWS), and 0 or rounding where j ≥ i; `total` is the cumulative sum of g.

    By differences of cumulative sums, or, if EXACT, by sums of each pair's own: a weak decay after a strong one
    keeps its digits.
    """
    if EXACT:
        step = tl.arange(0, ROWS)
        own = tl.where(step[:, None] < step[None, :], log_decay[None, :], 0.0)
        return tl.cumsum(own, axis=1)
    return tl.minimum(total[None, :] - total[:, None], 0.0)


@triton.jit
def last_of(steps, ROWS: tl.constexpr):
    """The last entry of a vector over the steps of a chunk."""
    return tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, steps, tl.zeros_like(steps)), axis=0)
