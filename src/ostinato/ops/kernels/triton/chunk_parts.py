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
def chunk_sums(
    log_decay,
    reset,
    sums,
    parts,
    time,
    heads,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    DECAY: tl.constexpr,
    RESET: tl.constexpr,
):
    """In each chunk of ROWS steps, the cumulative sums of the log-decays in powers of two, (batch, heads, time), and of
    the resets, (batch, time); time filled up to whole chunks, where nothing decays.

    Differences of the sums are what is exponentiated. Where `sums` is float64, a weak decay after strong ones keeps
    float32's digits in them.
    """
    padded = tl.num_programs(0) * ROWS
    start = tl.program_id(0).to(tl.int64) * ROWS
    batch = tl.program_id(1).to(tl.int64)
    step = start + tl.arange(0, ROWS)
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    if RESET:
        is_reset = tl.load(reset + batch * time + step, mask=step < time, other=0) != 0
        if tl.program_id(2) == 0:
            tl.store(parts + batch * padded + step, tl.cumsum(is_reset.to(tl.int32), axis=0))
    if DECAY:
        mask = (step < time)[:, None] & (head < heads)[None, :]
        g = tl.load(log_decay + (batch * time + step[:, None]) * heads + head[None, :], mask=mask, other=0.0)
        g = tl.maximum(g.to(tl.float32), FORGETS).to(sums.dtype.element_ty) * 1.4426950408889634
        if RESET:
            g = tl.where(is_reset[:, None], 0.0, g)
        place = sums + (batch * heads + head[None, :]) * padded + step[:, None]
        tl.store(place, tl.cumsum(g, axis=0), mask=(head < heads)[None, :])


@triton.jit
def last_of(steps, ROWS: tl.constexpr):
    """The last entry of a vector over the steps of a chunk."""
    return tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, steps, tl.zeros_like(steps)), axis=0)


@triton.jit
def operand(of, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """`of` as a factor of a product, in the type WIDE.

    Where that is float32 multiplied as tf32, it is rounded to tf32's digits: the tensor cores would cut it.
    """
    if PRECISION == "tf32" and WIDE == tl.float32:  # noqa: SIM300 (a constant of the launch)
        bits = of.to(tl.float32).to(tl.uint32, bitcast=True)
        return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    else:
        return of.to(WIDE)


@triton.jit
def first_term(of, WIDE: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr):
    """`of` as a factor of a product, or the first of TWO terms, of which `remainder` is the second.

    In bfloat16 that is cut, not rounded: the upper half of a float32 as it is. Rounding what is also widened again, for
    the remainder, would convert number by number (F2F), not in pairs. The terms hold sixteen digits, not seventeen.
    """
    if TWO and WIDE == tl.bfloat16:  # noqa: SIM300 (a constant of the launch)
        bits = of.to(tl.float32).to(tl.uint32, bitcast=True)
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return operand(of, WIDE, PRECISION)


@triton.jit
def remainder(of, rounded):
    """What `of` lost when it was rounded, or cut, rounded itself: the two terms have twice the digits of one."""
    return (of.to(tl.float32) - rounded.to(tl.float32)).to(rounded.dtype)


@triton.jit
def terms(of, WIDE: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr):
    """`of` as a factor of a product, and where there are to be TWO terms what that lost."""
    high = first_term(of, WIDE, PRECISION, TWO)
    if TWO:
        low = remainder(of, high)
    else:
        low = high
    return high, low


@triton.jit
def right_factor(of, WIDE: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr):
    """`of` as the right factor of `times`: in TWO terms these lie beside each other, (rows, 2 · columns).

    So tiles of 32 columns fill a line of shared memory, as Hopper's assembler wants (`launch.narrowest`), and the same
    instructions multiply both terms.
    """
    if TWO:
        high = first_term(of, WIDE, PRECISION, TWO)
        both = tl.permute(tl.join(high, remainder(of, high)), (0, 2, 1))
        return tl.reshape(both, (of.shape[0], 2 * of.shape[1]))
    else:
        return operand(of, WIDE, PRECISION)


@triton.jit
def times(left, right, PRECISION: tl.constexpr, TWO: tl.constexpr):
    """left @ the factor of which `right_factor` made `right`."""
    product = tl.dot(left, right, input_precision=PRECISION)
    if TWO:
        product = tl.sum(tl.reshape(product, (left.shape[0], 2, right.shape[1] // 2)), axis=1)
    return product


@triton.jit
def plus(acc, left, right, PRECISION: tl.constexpr, TWO: tl.constexpr):
    """acc + left @ right where there are TWO terms, of which one is a factor here; else acc."""
    if TWO:
        return tl.dot(left, right, acc=acc, input_precision=PRECISION)
    else:
        return acc


@triton.jit
def add_by_left(acc, left, right, WIDE: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr):
    """acc + left @ right, where `left` enters in one term or in TWO, one after the other: they share their place."""
    right = right.to(WIDE)
    high = first_term(left, WIDE, PRECISION, TWO)
    acc = tl.dot(high, right, acc=acc, input_precision=PRECISION)
    if TWO:
        acc = tl.dot(remainder(left, high), right, acc=acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_by_right(acc, left, right, WIDE: tl.constexpr, PRECISION: tl.constexpr, TWO: tl.constexpr):
    """acc + left @ right, where `right` enters in one term or in TWO, one after the other."""
    left = left.to(WIDE)
    high = first_term(right, WIDE, PRECISION, TWO)
    acc = tl.dot(left, high, acc=acc, input_precision=PRECISION)
    if TWO:
        acc = tl.dot(left, remainder(right, high), acc=acc, input_precision=PRECISION)
    return acc
