"""The walks of `linear_attention` with one decay per key channel, and the parts that they share.

With G_ic the sum of channel c's log-decays up to and with step i,
    y_i   = Σ_{j ≤ i} (Σ_c q_ic k_jc e^{G_ic − G_jc}) v_j        by_key
    dv_j  = Σ_{i ≥ j} (Σ_c k_jc q_ic e^{G_ic − G_jc}) dy_i       by_key, backwards in time
    dq_ic = Σ_{j ≤ i} (dy_i·v_j) e^{G_ic − G_jc} k_jc            by_value
    dk_jc = Σ_{i ≥ j} (v_j·dy_i) e^{G_ic − G_jc} q_ic            by_value, backwards in time
as in `linear_attention_walk`: readers, written and values in four roles, the state on chip.

In a chunk the decay of a pair is the product of a reader's factor and a written step's. If no channel forgets by
more than 2^−MILD over a chunk, both are taken to the middle of the channel's range: with base 2, 2^(G_i − G_C/2) and
2^(G_C/2 − G_j) lie within 2^±(MILD/2), far from the ends of the types' range, and one product of matrices gives all
pairs. For sequences with stronger decays no positive exponent would do, and the chunk's lower triangle is cut in
halves: the square of the late half of a block against its early half goes through the border between them, with both
exponents ≤ 0, one product for all blocks of a size. `channel_sums` says which sequences are which, and each walk is
launched for both kinds; programs of the other kind return at once.

In bfloat16 what is decayed, and by_value's state, enter products in two terms. What is left to round is the scores, in
by_key the state that is read, and the result, so that outputs and dv err by √2 times a rounding of the exact result
(measured: 1.4), dq and dk by 1.1 to 1.3, dg by 0.3 to 0.8. With one term it was 2.0, 1.7, and 2 to 7 for dg, growing
with time: dg is a difference of two walks, which round a decayed pair differently, each at its own side, and only the
scores alike, so that this cancels.

The gradient of the log-decays is the flow of `linear_attention_walk`, for each channel; by_value cumulates it on its
way back. All exponentials are to base 2.

Source: GLA (arXiv 2312.06635), sections 4.1 to 4.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import (
    FORGETS,
    load_steps,
    load_tile,
    right_factor,
    store_tile,
    terms,
    times,
)

TO_BASE_2 = tl.constexpr(1.4426950408889634)


@triton.jit
def sums(which, of, FINE: tl.constexpr):
    """which @ of, where `which` holds zeros and ones: float32 with its own digits, or (not FINE) sixteen of them."""
    if FINE:
        return tl.dot(which.to(tl.float32), of, input_precision="ieee")
    chosen = which.to(tl.float32).to(tl.bfloat16)
    if of.shape[1] < 64:  # Tiles that do not fill a line: see `right_factor`. Wider ones would need more registers.
        return times(chosen, right_factor(of, tl.bfloat16, "ieee", True), "ieee", True)
    high, low = terms(of, tl.bfloat16, "ieee", True)
    return tl.dot(chosen, high, acc=tl.dot(chosen, low))


@triton.jit
def bounded(
    log_decay,
    reset,
    start,
    stride,
    time,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESET: tl.constexpr,
    column,
):
    """Log-decays (ROWS, COLUMNS) in powers of two, bounded, and zero at a reset."""
    g = load_tile(log_decay, start, stride, time, column, WIDTH, ROWS, COLUMNS)
    g = tl.maximum(g.to(tl.float32), FORGETS) * TO_BASE_2
    if RESET:
        g = tl.where((load_steps(reset, start, 1, time, ROWS) != 0)[:, None], 0.0, g)
    return g


@triton.jit
def decays(
    log_decay,
    reset,
    start,
    stride,
    time,
    column,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESET: tl.constexpr,
    REVERSE: tl.constexpr,
    FINE: tl.constexpr,
):
    """Of a chunk's log-decays: themselves, and the sums that a reader and that a written step has towards the state."""
    g = bounded(log_decay, reset, start, stride, time, WIDTH, ROWS, COLUMNS, RESET, column)
    step = tl.arange(0, ROWS)
    before = sums(step[:, None] >= step[None, :], g, FINE)
    after = sums(step[:, None] < step[None, :], g, FINE)
    if REVERSE:
        before, after = after, before
    return g, before, after


@triton.jit
def crossings(parts, start, keep, ROWS: tl.constexpr, REVERSE: tl.constexpr):
    """Around a chunk's resets: the part of every step, the last one's, and the pairs to `keep` that are in one part;
    which steps read of the state that enters and which write to the one that leaves, and 1 if it goes through."""
    step = tl.arange(0, ROWS)
    part = tl.load(parts + start + step)
    count = tl.load(parts + start + ROWS - 1)
    enters, leaves = part == 0, part == count
    if REVERSE:
        enters, leaves = leaves, enters
    return part, count, keep & (part[:, None] == part[None, :]), enters, leaves, tl.where(count == 0, 1.0, 0.0)


@triton.jit
def channel_sums(
    log_decay,
    reset,
    centred,
    totals,
    strong,
    time,
    heads,
    MILD: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESET: tl.constexpr,
):
    """In each chunk, to base 2: G − G_C / 2 (batch, time, heads, WIDTH) and G_C (batch, heads, chunks, WIDTH).

    Sets to 1 the entries of `strong` (batch, heads) whose sequences have a channel that forgets more than MILD, in a
    chunk or a step.
    """
    chunk = tl.program_id(0)
    start = chunk * ROWS
    sequence = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    rows = (batch * time * heads + head) * WIDTH
    if RESET:
        reset += batch * time
    g = bounded(log_decay + rows, reset, start, heads * WIDTH, time, WIDTH, ROWS, COLUMNS, RESET, 0)
    of_chunk = tl.sum(g, axis=0)
    at = sequence * tl.num_programs(0) + chunk
    column = tl.arange(0, COLUMNS)
    tl.store(totals + at * WIDTH + column, of_chunk, mask=column < WIDTH)
    least = tl.minimum(of_chunk, tl.min(g, axis=0))
    if tl.min(least, axis=0) <= -MILD:
        tl.store(strong + sequence, 1)
    e = tl.cumsum(g, axis=0) - 0.5 * of_chunk[None, :]
    store_tile(centred + rows, start, heads * WIDTH, time, 0, e, WIDTH, ROWS, COLUMNS)


@triton.jit
def halving(step, size):
    """For blocks of 2 · size steps: which (t, s) with s between t and the border of the halves of t's block, on its
    own side and of those the border's far end; and which t are in the late half."""
    half = step // size
    late = half % 2 == 1
    to_border = tl.where(late[:, None], step[None, :] <= step[:, None], step[None, :] > step[:, None])
    return to_border & (half[:, None] == half[None, :]), late


@triton.jit
def square(step, size, reads):
    """Which (reader, written) are in the two halves of one block of 2 · size steps."""
    block = step // (2 * size)
    return (block[:, None] == block[None, :]) & reads[:, None] & (reads[None, :] == 0)
