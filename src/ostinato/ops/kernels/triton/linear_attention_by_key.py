"""`linear_attention` with one decay per key channel: the walk in which readers and written decay (`by_key`).

What it computes, and how, is told in `linear_attention_channels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS
from ostinato.ops.kernels.triton.linear_attention_channels import bounded, halving, square, sums
from ostinato.ops.kernels.triton.linear_attention_walk import factor, put, state_block, tile


@triton.jit
def _pairs_by_halves(
    x,
    z,
    g,
    levels,
    ROWS: tl.constexpr,
    REVERSE: tl.constexpr,
    FINE: tl.constexpr,
    PRECISION: tl.constexpr,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Decayed scores (reader, written), without mask."""
    step = tl.arange(0, ROWS)
    scores = tl.dot(x, tl.trans(z), input_precision=PRECISION)  # The diagonal, and what is overwritten or masked.
    for level in range(levels):
        size = 1 << level
        between, late = halving(step, size)
        reads = late == 0 if REVERSE else late
        both = factor(tl.where(reads[:, None], x, z) * tl.exp2(sums(between, g, FINE)), TYPE, WIDE)
        decayed = tl.dot(both, tl.trans(both), input_precision=PRECISION)
        scores = tl.where(square(step, size, reads), decayed, scores)
    return scores


@triton.jit
def by_key(
    readers,
    written,
    values,
    log_decay,
    reset,
    centred,
    totals,
    strong,
    parts,
    initial,
    outputs,
    last,
    kept,
    time,
    padded,
    heads,
    chunks,
    levels,
    readers_batch,
    readers_time,
    readers_head,
    written_batch,
    written_time,
    written_head,
    values_batch,
    values_time,
    values_head,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    RESET: tl.constexpr,
    INITIAL: tl.constexpr,
    LAST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FINE: tl.constexpr,
    TYPE: tl.constexpr,
    WIDE: tl.constexpr,
    COPIED: tl.constexpr,
    PRECISION: tl.constexpr,
    STRONG: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs, or (OUTPUTS false) only what a segment adds to the state, and how much of each key channel it keeps."""
    blocks = (VALUE_DIM + BV - 1) // BV
    segments = tl.num_programs(1)
    program = tl.program_id(0)
    block = program % blocks
    sequence = (program // blocks).to(tl.int64)
    segment = tl.program_id(1)
    if tl.load(strong + sequence) != STRONG:
        return
    batch, head = sequence // heads, sequence % heads
    first = block * BV
    log_decay += (batch * time * heads + head) * KEY_DIM
    if not COPIED:
        readers += batch * readers_batch + head * readers_head
        written += batch * written_batch + head * written_head
        values += batch * values_batch + head * values_head
        centred += (batch * time * heads + head) * KEY_DIM
        outputs += (batch * time * heads + head) * VALUE_DIM
    totals += sequence * (padded // ROWS) * KEY_DIM
    reset += batch * time
    parts += batch * padded

    place, inside = state_block(first, BV, BK, VALUE_DIM, 1, KEY_DIM, VALUE_DIM)
    place = (sequence * segments + segment) * (KEY_DIM * VALUE_DIM) + place
    if INITIAL:
        state = tl.load(initial + place, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], dtype=tl.float32)
    step, key = tl.arange(0, ROWS), tl.arange(0, BK)
    whole = tl.zeros([BK], dtype=tl.float32)
    count = tl.minimum(chunks, (time + ROWS - 1) // ROWS - segment * chunks)
    for index in tl.range(0, count, num_stages=STAGES):
        if REVERSE:
            start = (segment * chunks + count - 1 - index) * ROWS
        else:
            start = (segment * chunks + index) * ROWS
        z = tile(written, start, written_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        if OUTPUTS:
            x = tile(readers, start, readers_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        else:
            x = z
        u = tile(values, start, values_time, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED)
        u = factor(u, TYPE, WIDE)
        keep = step[:, None] <= step[None, :] if REVERSE else step[:, None] >= step[None, :]
        kept_of_state = 1.0
        if RESET:
            part = tl.load(parts + start + step)
            count_parts = tl.load(parts + start + ROWS - 1)
            keep = keep & (part[:, None] == part[None, :])
            enters, leaves = part == 0, part == count_parts
            if REVERSE:
                enters, leaves = leaves, enters
            kept_of_state = tl.where(count_parts == 0, 1.0, 0.0)
            whole += tl.where(count_parts == 0, 0.0, 2.0 * FORGETS)

        of_chunk = tl.load(totals + start // ROWS * KEY_DIM + key, mask=key < KEY_DIM, other=0.0)
        whole += of_chunk
        if STRONG == 0:
            half = 0.5 * of_chunk
            total = tile(centred, start, heads * KEY_DIM, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
            if REVERSE:
                total = -total
            wrote = factor(z * tl.exp2(-total), TYPE, WIDE)
            state = state * tl.exp2(half)[:, None]
            if OUTPUTS:
                read = factor(x * tl.exp2(total), TYPE, WIDE)
                scores = tl.dot(read, tl.trans(wrote), input_precision=PRECISION)
                y = tl.dot(read, factor(state, TYPE, WIDE), input_precision=PRECISION)
                if RESET:
                    y = tl.where(enters[:, None], y, 0.0)
                y = tl.dot(factor(tl.where(keep, scores, 0.0), TYPE, WIDE), u, acc=y, input_precision=PRECISION)
            if RESET:
                wrote = tl.where(leaves[:, None], wrote, tl.zeros_like(wrote))
                state = state * kept_of_state
            state = tl.dot(tl.trans(wrote), u, acc=state, input_precision=PRECISION) * tl.exp2(half)[:, None]
        else:
            g = bounded(log_decay, reset, start, heads * KEY_DIM, time, KEY_DIM, ROWS, BK, RESET, 0)
            before = sums(step[:, None] >= step[None, :], g, FINE)
            after = sums(step[:, None] < step[None, :], g, FINE)
            if REVERSE:
                before, after = after, before
            if OUTPUTS:
                y = tl.dot(
                    factor(x * tl.exp2(before), TYPE, WIDE), factor(state, TYPE, WIDE), input_precision=PRECISION
                )
                if RESET:
                    y = tl.where(enters[:, None], y, 0.0)
                scores = _pairs_by_halves(x, z, g, levels, ROWS, REVERSE, FINE, PRECISION, TYPE, WIDE)
                y = tl.dot(factor(tl.where(keep, scores, 0.0), TYPE, WIDE), u, acc=y, input_precision=PRECISION)
            wrote = factor(z * tl.exp2(after), TYPE, WIDE)
            state = state * tl.exp2(of_chunk)[:, None]
            if RESET:
                wrote = tl.where(leaves[:, None], wrote, tl.zeros_like(wrote))
                state = state * kept_of_state
            state = tl.dot(tl.trans(wrote), u, acc=state, input_precision=PRECISION)
        if OUTPUTS:
            put(outputs, start, heads * VALUE_DIM, time, first, batch, head, y, VALUE_DIM, ROWS, BV, COPIED)

    if LAST:
        tl.store(last + place, state, mask=inside)
    if (not OUTPUTS) and block == 0:
        tl.store(kept + (sequence * segments + segment) * KEY_DIM + key, tl.exp2(whole), mask=key < KEY_DIM)
