"""What the kernels of `delta_rule` share: where a chunk lies, its rates and resets, lengths, the triangular inverse.

A chunk has C rows, of which MICRO belong to one token; BQ is its number of tokens, or 16 if they are fewer. A sequence
is (batch, steps, heads, dim): rows are the steps of keys and values, tokens those of queries and outputs.

The inverse is by substitution in blocks of 16 rows, and by X ← X − X M X from there, M what lies below the blocks:
never a power series, which loses everything where keys are nearly parallel.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The factors of a chunk's rows, in this order: a, b, β, and c (of its tokens).
READ, WRITE, RATE, ASK = (tl.constexpr(i) for i in range(4))
ROWS = tl.constexpr(4)

EPS = tl.constexpr(1e-6)
"""Under the root of a key's length, as in the formula of the plain routes."""


@triton.jit
def places(n, pair, tokens, heads, C: tl.constexpr, MICRO: tl.constexpr, BQ: tl.constexpr):
    """Where chunk `n` of batch and head `pair` lies: its first token in a (batch, time) sequence; the first steps of
    keys and of queries, in (batch, steps, heads); and which of its rows and tokens exist.
    """
    TOKENS: tl.constexpr = C // MICRO
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    batch = (pair // heads).to(tl.int64)
    head = pair % heads
    steps = tokens * MICRO
    row_in = (row < TOKENS * MICRO) & (n * (TOKENS * MICRO) + row < steps)
    token_in = (token < TOKENS) & (n * TOKENS + token < tokens)
    start = ((batch * steps + n * (TOKENS * MICRO)) * heads + head).to(tl.int64)
    origin = ((batch * tokens + n * TOKENS) * heads + head).to(tl.int64)
    return batch * tokens + n * TOKENS, start, origin, row_in, token_in


@triton.jit
def offsets(start, step, column, heads, WIDTH: tl.constexpr):
    """Of a tile of a sequence of `WIDTH` columns: steps and columns counted from step `start`."""
    return start * WIDTH + step[:, None] * (heads * WIDTH) + column[None, :]


@triton.jit
def load_rates(beta, start, row, row_in, heads, BETA: tl.constexpr):
    """β of the rows, 1 where there is none; 0 beyond the end."""
    if BETA:
        return tl.load(beta + start + row * heads, mask=row_in, other=0.0).to(tl.float32)
    else:
        return row_in.to(tl.float32)


@triton.jit
def lengths(tile, ROWS: tl.constexpr, NORMALIZE: tl.constexpr):
    """What each row of a tile is to be multiplied by: one over its length, or 1."""
    if NORMALIZE:
        wide = tile.to(tl.float32)
        return tl.rsqrt(tl.sum(wide * wide, 1) + EPS)
    else:
        return tl.full([ROWS], 1.0, tl.float32)


@triton.jit
def segments(reset, position, taken, RESET: tl.constexpr):
    """How many resets a chunk has had at `position`, itself included, of those that are `taken`; and where they are."""
    begins = tl.zeros(position.shape, tl.int32)
    if RESET:
        begins = tl.load(reset + position, mask=taken, other=0).to(tl.int32)
        return tl.cumsum(begins, 0), begins
    else:
        return begins, begins


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)⁻¹ of a strictly lower triangular L, (C, C)."""
    BLOCKS: tl.constexpr = C // 16
    block = tl.arange(0, BLOCKS)
    small = tl.arange(0, 16)
    same = block[:, None, None, None] == block[None, None, :, None]
    parts = tl.reshape(lower, (BLOCKS, 16, BLOCKS, 16))
    columns = tl.trans(tl.sum(tl.where(same, parts, 0.0), axis=2), (0, 2, 1))
    solved = (small[None, :, None] == small[None, None, :]).to(tl.float32) + tl.zeros([BLOCKS, 16, 16], tl.float32)
    for i in range(1, 16):
        weight = tl.sum(tl.where(small[None, None, :] == i, columns, 0.0), axis=2)
        known = tl.sum(weight[:, :, None] * solved, axis=1)
        solved = tl.where(small[None, :, None] == i, solved - known[:, None, :], solved)
    inverse = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), (C, C))
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    for level in tl.static_range(5):
        if 16 * 2**level < C:
            below = (row // (16 * 2**level) != column // (16 * 2**level)) & (
                row // (32 * 2**level) == column // (32 * 2**level)
            )
            right = tl.dot(tl.where(below, lower, 0.0), inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, right, input_precision=PRECISION)
    return inverse
