"""`linear_attention` with one decay per key channel: the walk in which readers and written decay (`by_key`).

What it computes, and how, is told in `linear_attention_channels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS, first_term, operand, plus, remainder, terms
from ostinato.ops.kernels.triton.linear_attention_channels import crossings, decays, halving, square, sums
from ostinato.ops.kernels.triton.linear_attention_parts import (
    chunk_start,
    held_state,
    put,
    role_of_program,
    tile,
)


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
    WIDE: tl.constexpr,
    TWO: tl.constexpr,
):
    """Decayed scores (reader, written), without mask."""
    step = tl.arange(0, ROWS)
    scores = tl.dot(x, tl.trans(z), input_precision=PRECISION)  # The diagonal, and what is overwritten or masked.
    for level in range(levels):
        size = 1 << level
        between, late = halving(step, size)
        reads = late == 0 if REVERSE else late
        both, rest = terms(tl.where(reads[:, None], x, z) * tl.exp2(sums(between, g, FINE)), WIDE, PRECISION, TWO)
        decayed = tl.dot(both, tl.trans(both), input_precision=PRECISION)
        decayed = plus(decayed, both, tl.trans(rest), PRECISION, TWO)
        decayed = plus(decayed, rest, tl.trans(both), PRECISION, TWO)
        scores = tl.where(square(step, size, reads), decayed, scores)
    return scores


@triton.jit
def by_key(
    readers,
    written,
    centred,
    values,
    outputs,
    parts,
    initial,
    last,
    time,
    padded,
    heads,
    chunks,
    readers_batch,
    readers_time,
    readers_head,
    written_batch,
    written_time,
    written_head,
    values_batch,
    values_time,
    values_head,
    kept,
    log_decay,
    reset,
    totals,
    strong,
    levels,
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
    WIDE: tl.constexpr,
    COPIED: tl.constexpr,
    PRECISION: tl.constexpr,
    STRONG: tl.constexpr,
    STAGES: tl.constexpr,
    TWO: tl.constexpr,
):
    """Outputs, or (OUTPUTS false) only what a segment adds to the state, and how much of each key channel it keeps."""
    segments = tl.num_programs(1)
    block, sequence, batch, head = role_of_program(heads, VALUE_DIM, BV)
    segment = tl.program_id(1)
    if tl.load(strong + sequence) != STRONG:
        return
    first = block * BV
    log_decay += (batch * time * heads + head) * KEY_DIM
    if not COPIED:
        readers += batch * readers_batch + head * readers_head
        written += batch * written_batch + head * written_head
        values += batch * values_batch + head * values_head
        centred += (batch * time * heads + head) * KEY_DIM
        if OUTPUTS:
            outputs += (batch * time * heads + head) * VALUE_DIM
    totals += sequence * (padded // ROWS) * KEY_DIM
    if RESET:
        reset += batch * time
        parts += batch * padded

    where = sequence * segments + segment
    state, place, inside = held_state(initial, where, first, VALUE_DIM, 1, KEY_DIM, VALUE_DIM, BK, BV, INITIAL)
    step, key = tl.arange(0, ROWS), tl.arange(0, BK)
    whole = tl.zeros([BK], dtype=tl.float32)
    count = tl.minimum(chunks, (time + ROWS - 1) // ROWS - segment * chunks)
    for index in tl.range(0, count, num_stages=STAGES):
        start = chunk_start(index, count, segment * chunks, ROWS, REVERSE)
        z = tile(written, start, written_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        if OUTPUTS:
            x = tile(readers, start, readers_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        else:
            x = z
        u = tile(values, start, values_time, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED)
        u = operand(u, WIDE, PRECISION)
        keep = step[:, None] <= step[None, :] if REVERSE else step[:, None] >= step[None, :]
        if RESET:
            _, count_parts, keep, enters, leaves, kept_of_state = crossings(parts, start, keep, ROWS, REVERSE)
            whole += tl.where(count_parts == 0, 0.0, 2.0 * FORGETS)

        of_chunk = tl.load(totals + start // ROWS * KEY_DIM + key, mask=key < KEY_DIM, other=0.0)
        whole += of_chunk
        if STRONG == 0:
            half = 0.5 * of_chunk
            total = tile(centred, start, heads * KEY_DIM, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
            if REVERSE:
                total = -total
            state = state * tl.exp2(half)[:, None]
            if OUTPUTS:
                read, rest = terms(x * tl.exp2(total), WIDE, PRECISION, TWO)
                entering = operand(state, WIDE, PRECISION)
                y = plus(tl.dot(read, entering, input_precision=PRECISION), rest, entering, PRECISION, TWO)
            decayed = z * tl.exp2(-total)
            wrote = first_term(decayed, WIDE, PRECISION, TWO)
            if OUTPUTS:
                scores = tl.dot(read, tl.trans(wrote), input_precision=PRECISION)
                scores = plus(scores, rest, tl.trans(wrote), PRECISION, TWO)
            wrote_rest = remainder(decayed, wrote)  # This late, it takes the place of what came before.
            if OUTPUTS:
                scores = plus(scores, read, tl.trans(wrote_rest), PRECISION, TWO)
                if RESET:
                    y = tl.where(enters[:, None], y, 0.0)
                y = tl.dot(operand(tl.where(keep, scores, 0.0), WIDE, PRECISION), u, acc=y, input_precision=PRECISION)
            if RESET:
                wrote = tl.where(leaves[:, None], wrote, tl.zeros_like(wrote))
                wrote_rest = tl.where(leaves[:, None], wrote_rest, tl.zeros_like(wrote_rest))
                state = state * kept_of_state
            state = tl.dot(tl.trans(wrote), u, acc=state, input_precision=PRECISION)
            state = plus(state, tl.trans(wrote_rest), u, PRECISION, TWO) * tl.exp2(half)[:, None]
        else:
            g, before, after = decays(
                log_decay, reset, start, heads * KEY_DIM, time, 0, KEY_DIM, ROWS, BK, RESET, REVERSE, FINE
            )
            if OUTPUTS:
                read, rest = terms(x * tl.exp2(before), WIDE, PRECISION, TWO)
                entering = operand(state, WIDE, PRECISION)
                y = plus(tl.dot(read, entering, input_precision=PRECISION), rest, entering, PRECISION, TWO)
                if RESET:
                    y = tl.where(enters[:, None], y, 0.0)
                scores = _pairs_by_halves(x, z, g, levels, ROWS, REVERSE, FINE, PRECISION, WIDE, TWO)
                y = tl.dot(operand(tl.where(keep, scores, 0.0), WIDE, PRECISION), u, acc=y, input_precision=PRECISION)
            wrote = z * tl.exp2(after)
            state = state * tl.exp2(of_chunk)[:, None]
            if RESET:
                wrote = tl.where(leaves[:, None], wrote, 0.0)
                state = state * kept_of_state
            wrote, wrote_rest = terms(wrote, WIDE, PRECISION, TWO)
            state = tl.dot(tl.trans(wrote), u, acc=state, input_precision=PRECISION)
            state = plus(state, tl.trans(wrote_rest), u, PRECISION, TWO)
        if OUTPUTS:
            put(outputs, start, heads * VALUE_DIM, time, first, batch, head, y, VALUE_DIM, ROWS, BV, COPIED)

    if LAST:
        tl.store(last + place, state, mask=inside)
    if (not OUTPUTS) and block == 0:
        tl.store(kept + where * KEY_DIM + key, tl.exp2(whole), mask=key < KEY_DIM)
