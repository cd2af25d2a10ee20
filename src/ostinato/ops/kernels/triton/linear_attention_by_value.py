"""`linear_attention` with one decay per key channel: the walk in which values and outputs decay (`by_value`).

What it computes, and how, is told in `linear_attention_channels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS, load_steps, load_tile, operand, right_factor, times
from ostinato.ops.kernels.triton.linear_attention_channels import crossings, decays, halving, square, sums
from ostinato.ops.kernels.triton.linear_attention_parts import (
    chunk_start,
    held_state,
    put,
    read_by_last,
    role_of_program,
    tile,
)


@triton.jit
def _outputs_by_halves(
    u,
    g,
    scores,
    y,
    levels,
    ROWS: tl.constexpr,
    REVERSE: tl.constexpr,
    FINE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TWO: tl.constexpr,
):
    """y plus the outputs of `scores` (reader, written) off the diagonal."""
    step = tl.arange(0, ROWS)
    for level in range(levels):
        size = 1 << level
        between, late = halving(step, size)
        reads = late == 0 if REVERSE else late
        decay = tl.exp2(sums(between, g, FINE))
        chosen = operand(tl.where(square(step, size, reads), scores, 0.0), WIDE, PRECISION)
        y += decay * times(chosen, right_factor(u * decay, WIDE, PRECISION, TWO), PRECISION, TWO)
    return y


@triton.jit
def by_value(
    readers,
    written,
    values,
    outputs,
    beside,
    centred,
    products,
    gradient,
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
    flow,
    last_reader,
    beside_batch,
    beside_time,
    beside_head,
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
    FINE: tl.constexpr,
    WIDE: tl.constexpr,
    COPIED: tl.constexpr,
    PRECISION: tl.constexpr,
    STRONG: tl.constexpr,
    STAGES: tl.constexpr,
    TWO: tl.constexpr,
):
    """Forwards: `products` is set to beside ⊙ outputs, without the pair of a step with itself, and the last state is
    without what the last step wrote. Backwards, the gradient of the log-decays is cumulated of products − beside ⊙
    outputs, from `flow` at the end. A state lies in memory as (value, key)."""
    segments = tl.num_programs(1)
    block, sequence, batch, head = role_of_program(heads, VALUE_DIM, BV)
    segment = tl.program_id(1)
    if tl.load(strong + sequence) != STRONG:
        return
    first = block * BV
    own_rows = (batch * time * heads + head) * VALUE_DIM
    log_decay += own_rows
    if not COPIED:
        readers += batch * readers_batch + head * readers_head
        written += batch * written_batch + head * written_head
        values += batch * values_batch + head * values_head
        beside += batch * beside_batch + head * beside_head
        centred += own_rows
        outputs += own_rows
        if REVERSE:
            gradient += own_rows
        products += own_rows
    totals += sequence * (padded // ROWS) * VALUE_DIM
    if RESET:
        reset += batch * time
        parts += batch * padded

    where = sequence * segments + segment
    state, place, inside = held_state(initial, where, first, 1, KEY_DIM, KEY_DIM, VALUE_DIM, BK, BV, INITIAL)
    channel = first + tl.arange(0, BV)
    carry = tl.zeros([BV], dtype=tl.float32)
    if REVERSE and INITIAL:
        carry = tl.load(flow + where * VALUE_DIM + channel, mask=channel < VALUE_DIM, other=0.0)
        # What the last step reads of the last state's gradient, in this program if it has that step.
        read_of_end = tl.zeros([BV], dtype=tl.float32)
        if segment == segments - 1:
            read_of_end = read_by_last(state, last_reader, sequence, KEY_DIM, BK)

    step = tl.arange(0, ROWS)
    row = heads * VALUE_DIM
    count = tl.minimum(chunks, (time + ROWS - 1) // ROWS - segment * chunks)
    for index in tl.range(0, count, num_stages=STAGES):
        start = chunk_start(index, count, segment * chunks, ROWS, REVERSE)
        x = tile(readers, start, readers_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        z = tile(written, start, written_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        u = tile(values, start, values_time, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED)
        at_end = start + step == time - 1

        scores = tl.dot(x, tl.trans(z), input_precision=PRECISION)
        own = tl.sum(tl.where(step[:, None] == step[None, :], scores, 0.0), axis=1)
        keep = step[:, None] < step[None, :] if REVERSE else step[:, None] > step[None, :]
        enters, leaves = start + step >= 0, start + step >= 0
        kept_of_state = 1.0
        if RESET:
            part, count_parts, keep, enters, leaves, kept_of_state = crossings(parts, start, keep, ROWS, REVERSE)
        if REVERSE:
            enters = enters & (at_end == 0)
        else:
            leaves = leaves & (at_end == 0)
        scores = tl.where(keep, scores, 0.0)

        of_chunk = tl.load(totals + start // ROWS * VALUE_DIM + channel, mask=channel < VALUE_DIM, other=0.0)
        if STRONG == 0:
            half = 0.5 * of_chunk
            total = tile(centred, start, row, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED)
            if REVERSE:
                total = -total
            state = state * tl.exp2(half)[None, :]
            y = times(x.to(WIDE), right_factor(state, WIDE, PRECISION, TWO), PRECISION, TWO)
            if RESET or (REVERSE and INITIAL):
                y = tl.where(enters[:, None], y, 0.0)
            wrote = right_factor(u * tl.exp2(-total), WIDE, PRECISION, TWO)
            y += times(operand(scores, WIDE, PRECISION), wrote, PRECISION, TWO)
            y = y * tl.exp2(total)
            if RESET or not REVERSE:
                wrote = tl.where(leaves[:, None], wrote, tl.zeros_like(wrote))
            writer = operand(tl.trans(z), WIDE, PRECISION)
            state = (state * kept_of_state + times(writer, wrote, PRECISION, TWO)) * tl.exp2(half)[None, :]
        else:
            g, before, after = decays(
                log_decay, reset, start, row, time, first, VALUE_DIM, ROWS, BV, RESET, REVERSE, FINE
            )
            y = times(x.to(WIDE), right_factor(state, WIDE, PRECISION, TWO), PRECISION, TWO) * tl.exp2(before)
            if RESET or (REVERSE and INITIAL):
                y = tl.where(enters[:, None], y, 0.0)
            y = _outputs_by_halves(u, g, scores, y, levels, ROWS, REVERSE, FINE, PRECISION, WIDE, TWO)
            written_now = tl.where(leaves[:, None], u, tl.zeros_like(u)) * tl.exp2(after)
            wrote, writer = right_factor(written_now, WIDE, PRECISION, TWO), operand(tl.trans(z), WIDE, PRECISION)
            state = state * (tl.exp2(of_chunk) * kept_of_state)[None, :] + times(writer, wrote, PRECISION, TWO)

        w = tile(beside, start, beside_time, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED)
        product = y * w
        y = y + own[:, None] * u
        if REVERSE and INITIAL:
            y = y + tl.where(at_end[:, None], read_of_end[None, :], 0.0)
        put(outputs, start, row, time, first, batch, head, y, VALUE_DIM, ROWS, BV, COPIED)
        if REVERSE:
            change = tile(products, start, row, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED) - product
            later = step[:, None] <= step[None, :]
            if RESET:
                later = later & (part[:, None] == part[None, :])
            cumulated = sums(later, change, FINE)
            if RESET:
                cumulated += tl.where((part == count_parts)[:, None], carry[None, :], 0.0)
                carry = tl.where(count_parts == 0, carry, 0.0)
                carry += tl.sum(tl.where((part == 0)[:, None], change, 0.0), axis=0)
                is_reset = load_steps(reset, start, 1, time, ROWS) != 0
                cumulated = tl.where(is_reset[:, None], 0.0, cumulated)
            else:
                cumulated += carry[None, :]
                carry += tl.sum(change, axis=0)
            if STRONG != 0:  # What is clamped is strong.
                forgets = load_tile(log_decay, start, row, time, first, VALUE_DIM, ROWS, BV) <= FORGETS
                cumulated = tl.where(forgets, 0.0, cumulated)
            put(gradient, start, row, time, first, batch, head, cumulated, VALUE_DIM, ROWS, BV, COPIED)
        else:
            put(products, start, row, time, first, batch, head, product, VALUE_DIM, ROWS, BV, COPIED)

    if not REVERSE:
        tl.store(last + place, state, mask=inside)
