"""What the kernels of `delta_rule` share: where a chunk lies, rates, resets, lengths, scales, the triangular inverse.

A chunk has C rows, of which MICRO belong to one token; BQ is its number of tokens, or 16 if they are fewer. A sequence
is (batch, steps, heads, dim): rows are the steps of keys and values, tokens those of queries and outputs.

Half precision is multiplied as float16, whose eleven bits are three more than bfloat16's at the same speed. Its range
is short, so that every tile is brought into it by a power of two, which rounds nothing: each key and query by its own
largest entry, a tile of states, values or gradients by the tile's. Entries 2⁻¹⁶ times as large as the largest, or
larger, then have no fewer digits than in bfloat16. In float32 all these powers are 1.

The inverse is by substitution in blocks of 16 rows, and by X ← X − X M X from there, M what lies below the blocks:
never a power series, which loses everything where keys are nearly parallel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import operand

# The factors of a chunk's rows and, where they are of queries, of its tokens, in this order. With m the factors that
# make keys and queries, as they are multiplied, what they stand for: a, b, β m², 1/m of the keys that read, c, m of
# the queries; then the powers of two by which keys to read, keys to write and queries were multiplied.
READ, WRITE, RATE, VALUE, ASK, QUERY, READ_SCALE, WRITE_SCALE, QUERY_SCALE = (tl.constexpr(i) for i in range(9))
ROWS = tl.constexpr(9)

# What the walks leave a scale of, for each block of values: S, r, dS' and e.
ENTERING, FRESH, LEAVING, RESIDUAL = (tl.constexpr(i) for i in range(4))
KEPT = tl.constexpr(4)

TOP = tl.constexpr(8)
"""The largest entry of a scaled tile is 2 to this, or up to twice that."""
GROWS = tl.constexpr(2)
"""The same, of tiles whose product with Y is then added: r may be 2⁷ times as large as x where keys are parallel."""
LITTLE = tl.constexpr(2.0**-50)
"""Of two tiles that are summed, the smaller counts as no smaller than this times the other."""

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
def powers(largest, HIGH: tl.constexpr):
    """The power of two that brings `largest` into [2^HIGH, 2^(HIGH + 1)), and its inverse."""
    exponent = tl.minimum(tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) & 255, HIGH + 1), 254)
    inverse = exponent - HIGH
    return ((254 - inverse) << 23).to(tl.float32, bitcast=True), (inverse << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_scales(tile, dtype: tl.constexpr, ROWS: tl.constexpr, NORMALIZE: tl.constexpr):
    """Of rows that are multiplied in `dtype`: the power of two they are multiplied by, and what makes good for it.

    With NORMALIZE the latter also makes them of unit length.
    """
    wide = tile.to(tl.float32)
    if dtype == tl.float16:
        scale, factor = powers(tl.maximum(tl.max(tl.abs(wide), 1), 2.0**-24), -1)
    else:
        scale = tl.full([ROWS], 1.0, tl.float32)
        factor = scale
    if NORMALIZE:
        factor *= tl.rsqrt(tl.sum(wide * wide, 1) + EPS)
    return scale, factor


@triton.jit
def tile_scale(tile, least, dtype: tl.constexpr, HIGH: tl.constexpr):
    """The power of two to multiply a tile by before it is rounded to `dtype`, and its inverse.

    Its largest entry counts as no smaller than `least`.
    """
    if dtype == tl.float16:
        return powers(tl.maximum(tl.max(tl.abs(tile)), least), HIGH)
    else:
        return 1.0, 1.0


@triton.jit
def narrowed(tile, dtype: tl.constexpr):
    """A tile, scaled and rounded to `dtype`, and what to multiply products with it by."""
    scale, unit = tile_scale(tile, 0.0, dtype, TOP)
    return (tile * scale).to(dtype), unit


@triton.jit
def unit_of(units, chunk, blocks, block, KIND: tl.constexpr):
    """Where the scale of one of a chunk's kept tiles is."""
    return units + (chunk * KEPT + KIND) * blocks + block


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
def multiply(a, b, PRECISION: tl.constexpr):
    """A product in float32; where that is tf32, its factors are rounded, not cut: a cut is always towards zero."""
    return tl.dot(operand(a, tl.float32, PRECISION), operand(b, tl.float32, PRECISION), input_precision=PRECISION)


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
            right = multiply(tl.where(below, lower, 0.0), inverse, PRECISION)
            inverse -= multiply(inverse, right, PRECISION)
    return inverse


@triton.jit
def solved_scores(lower, rate, C: tl.constexpr, PRECISION: tl.constexpr):
    """Y = A (I + βA)⁻¹ of a strictly lower triangular A, as β⁻¹ (I − (I + βA)⁻¹): nothing large is summed up to little.

    A β of 0 is taken for one too small to matter: row i of the inverse, less I, is linear in β_i.
    """
    some = tl.where(tl.abs(rate) < 2.0**-60, 2.0**-60, rate)
    inverse = unit_lower_inverse(some[:, None] * lower, C, PRECISION)
    row = tl.arange(0, C)
    return tl.where(row[:, None] > row[None, :], inverse * (-1 / some)[:, None], 0.0)
