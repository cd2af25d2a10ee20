"""One walk over time that is the forward pass of `linear_attention` with one decay per head, and all of its backward.

With A_ij the product of the decays between step j and step i ≥ j,
    y_i  = Σ_{j ≤ i} A_ij (q_i·k_j) v_j            (and what the state holds)
    dq_i = Σ_{j ≤ i} A_ij (dy_i·v_j) k_j
    dk_j = Σ_{i ≥ j} A_ij (v_j·dy_i) q_i
    dv_j = Σ_{i ≥ j} A_ij (k_j·q_i) dy_i
are one function of (readers, written, values), forwards in time or backwards. A program has one head, one block of
value channels and one segment of time, and carries the state on chip from chunk to chunk: it reads three
sequences, writes one, and nothing else touches memory. Where heads are too few to fill the card, time is cut into
segments: one pass finds what each segment adds to the state, a second what enters each, a third walks.

The gradient of the log-decays is dg_t = Σ_{i ≥ t > j} A_ij (q_i·k_j)(dy_i·v_j), the flow from before t to t and
after. It is cumulated from the end of (q_i·dq_i) − (k_i·dk_i), both without their pair i = j, which no decay touches:
what cancels is then no larger than the flow itself, also where decays are strong. The last step and the last state
are such a pair, too: it is left out of k_T·dk_T, and of the last state that the flow at the end is reckoned from.

In bfloat16 with decays what is added to the state enters its product in two terms, and so does the state where dq and
dk are read from it: outputs and dv err by 1.4 times a rounding of the exact result, dq and dk by 1.1 to 1.3, dg by 0.3
to 0.8. With one term it was 1.5 to 1.7 (the more, the weaker the decays), and 3 to 4 for dg. Without decays there is
but the state to round, and all err by 1.4.

Source: GLA (arXiv 2312.06635), section 4; the two levels, segments of chunks: TFLA (arXiv 2503.14376), section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS, add_by_right, last_of, operand
from ostinato.ops.kernels.triton.linear_attention_parts import (
    chunk_start,
    held_state,
    put,
    read_by_last,
    role_of_program,
    tile,
)


@triton.jit
def walk(
    readers,
    written,
    values,
    outputs,
    beside,
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
    sums,
    products,
    kept,
    last_reader,
    beside_batch,
    beside_time,
    beside_head,
    by_key,
    by_value,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    RESET: tl.constexpr,
    INITIAL: tl.constexpr,
    LAST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDE: tl.constexpr,
    COPIED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    TWO: tl.constexpr,
    TWO_OF_STATE: tl.constexpr,
):
    """Outputs, or (OUTPUTS false) only what a segment adds to the state and how much of the state it keeps.

    PRODUCTS: also the inner product of each row of `beside` with the output, without the pair of a step with itself,
    and the last state is without what the last step wrote.
    WIDE: the type of operands that can outgrow the inputs' range.
    """
    segments = tl.num_programs(1)
    block, sequence, batch, head = role_of_program(heads, VALUE_DIM, BV)
    segment = tl.program_id(1)
    first = block * BV

    if not COPIED:
        readers += batch * readers_batch + head * readers_head
        written += batch * written_batch + head * written_head
        values += batch * values_batch + head * values_head
        if OUTPUTS:
            outputs += (batch * time * heads + head) * VALUE_DIM
        if PRODUCTS:
            beside += batch * beside_batch + head * beside_head
    if PRODUCTS:
        blocks = (VALUE_DIM + BV - 1) // BV
        products += (block * (tl.num_programs(0) // blocks) + sequence) * time
    if DECAY:
        sums += sequence * padded
    if RESET:
        parts += batch * padded

    where = sequence * segments + segment
    state, place, inside = held_state(initial, where, first, by_key, by_value, KEY_DIM, VALUE_DIM, BK, BV, INITIAL)
    if PRODUCTS and REVERSE and INITIAL:
        # What the last step reads of the last state's gradient, in this program if it has that step.
        read_of_end = tl.zeros([BV], dtype=tl.float32)
        if segment == segments - 1:
            read_of_end = read_by_last(state, last_reader, sequence, KEY_DIM, BK)

    step = tl.arange(0, ROWS)
    whole = tl.full([], 0.0, tl.float32)
    count = tl.minimum(chunks, (time + ROWS - 1) // ROWS - segment * chunks)
    for index in tl.range(0, count, num_stages=STAGES):
        start = chunk_start(index, count, segment * chunks, ROWS, REVERSE)
        z = tile(written, start, written_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        u = tile(values, start, values_time, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED)
        if OUTPUTS:
            x = tile(readers, start, readers_time, time, 0, batch, head, KEY_DIM, ROWS, BK, COPIED)
        if PRODUCTS:
            w = tile(beside, start, beside_time, time, first, batch, head, VALUE_DIM, ROWS, BV, COPIED)

        if RESET:
            part = tl.load(parts + start + step)
            count_parts = tl.load(parts + start + ROWS - 1)
            carry = tl.where(count_parts == 0, 1.0, 0.0)
            whole = tl.where(count_parts > 0, 2.0 * FORGETS, whole)
            entering = tl.where(part == 0, 1.0, 0.0)
            leaving = tl.where(part == count_parts, 1.0, 0.0)
        else:
            carry = 1.0
            entering, leaving = tl.full([ROWS], 1.0, tl.float32), tl.full([ROWS], 1.0, tl.float32)
        if DECAY:
            total = tl.load(sums + start + step)
            of_chunk = tl.load(sums + start + ROWS - 1)
            whole += of_chunk.to(tl.float32)
            carry = carry * tl.exp2(of_chunk.to(tl.float32))
            entering = entering * tl.exp2(total.to(tl.float32))
            leaving = leaving * tl.exp2((of_chunk - total).to(tl.float32))
        if REVERSE:
            entering, leaving = leaving, entering

        if OUTPUTS:
            scores = tl.dot(x, tl.trans(z), input_precision=PRECISION)
            y = add_by_right(tl.zeros([ROWS, BV], tl.float32), x, state, WIDE, PRECISION, TWO_OF_STATE)
            # Rows read, columns are what is written.
            if PRODUCTS:
                own = tl.sum(tl.where(step[:, None] == step[None, :], scores, 0.0), axis=1)
                keep = step[:, None] < step[None, :] if REVERSE else step[:, None] > step[None, :]
            else:
                keep = step[:, None] <= step[None, :] if REVERSE else step[:, None] >= step[None, :]
            if RESET:
                keep = keep & (part[:, None] == part[None, :])
            if DECAY:
                if REVERSE:
                    pairs = (total[None, :] - total[:, None]).to(tl.float32)
                else:
                    pairs = (total[:, None] - total[None, :]).to(tl.float32)
                scores = scores * tl.exp2(tl.where(keep, pairs, float("-inf")))
            else:
                scores = tl.where(keep, scores, 0.0)
            if PRODUCTS and REVERSE and INITIAL:
                entering = tl.where(start + step == time - 1, 0.0, entering)
            if DECAY or RESET:
                y = y * entering[:, None]
            y = tl.dot(operand(scores, WIDE, PRECISION), operand(u, WIDE, PRECISION), acc=y, input_precision=PRECISION)
            if PRODUCTS:
                product = tl.sum(y * w.to(tl.float32), axis=1)
                tl.store(products + start + step, product, mask=step < time - start)
                y = y + own[:, None] * u.to(tl.float32)
                if REVERSE and INITIAL:
                    y = y + tl.where(start + step == time - 1, 1.0, 0.0)[:, None] * read_of_end[None, :]
            put(outputs, start, heads * VALUE_DIM, time, first, batch, head, y, VALUE_DIM, ROWS, BV, COPIED)

        added = u
        if DECAY or RESET:
            if PRODUCTS and not REVERSE:
                leaving = tl.where(start + step == time - 1, 0.0, leaving)
            added = u.to(tl.float32) * leaving[:, None]
            state = state * carry
        state = add_by_right(state, tl.trans(z), added, WIDE, PRECISION, TWO)

    if LAST:
        tl.store(last + place, state, mask=inside)
    if (not OUTPUTS) and block == 0:
        tl.store(kept + where, tl.exp2(whole))


@triton.jit
def enter(
    added,
    kept,
    initial,
    entering,
    last,
    segments,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PER_KEY: tl.constexpr,
    REVERSE: tl.constexpr,
    INITIAL: tl.constexpr,
):
    """The state that enters each segment, and the last one, of S_{n+1} = kept_n S_n + added_n; rows of SIZE numbers.

    `kept` is one number a segment, or with PER_KEY > 0 one for every PER_KEY numbers of the state.
    """
    sequence = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < SIZE
    if INITIAL:
        state = tl.load(initial + sequence * SIZE + offset, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(segments):
        segment = index
        if REVERSE:
            segment = segments - 1 - index
        row = sequence * segments + segment
        tl.store(entering + row * SIZE + offset, state, mask=inside)
        if PER_KEY > 0:
            factor = tl.load(kept + row * (SIZE // PER_KEY) + offset // PER_KEY, mask=inside, other=0.0)
        else:
            factor = tl.load(kept + row)
        state = state * factor + tl.load(added + row * SIZE + offset, mask=inside, other=0.0)
    tl.store(last + sequence * SIZE + offset, state, mask=inside)


@triton.jit
def _join(early, early_cut, late, late_cut):
    """Sums that start anew at a cut."""
    return tl.where(late_cut > 0, late, early + late), early_cut | late_cut


@triton.jit
def decay_gradient(
    read,
    wrote,
    flow,
    log_decay,
    reset,
    gradient,
    time,
    heads,
    per_segment,
    blocks_read,
    blocks_wrote,
    RESET: tl.constexpr,
    FLOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dg_t = Σ_{s ≥ t} (read_s − wrote_s) + flow, over the steps from t to the end of its sequence or segment."""
    sequence = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    rows = tl.num_programs(0).to(tl.int64) * time
    batch, head = sequence // heads, sequence % heads
    carry = 0.0
    if FLOW:
        carry = tl.load(flow + sequence * tl.num_programs(1) + segment)
    end = tl.minimum((segment + 1) * per_segment, time)
    steps = end - segment * per_segment
    for index in range((steps + BLOCK - 1) // BLOCK):
        # Latest first.
        t = end - 1 - index * BLOCK - tl.arange(0, BLOCK)
        inside = t >= segment * per_segment
        change = tl.zeros([BLOCK], dtype=tl.float32)
        for block in range(blocks_read):
            change += tl.load(read + block * rows + sequence * time + t, mask=inside, other=0.0)
        for block in range(blocks_wrote):
            change -= tl.load(wrote + block * rows + sequence * time + t, mask=inside, other=0.0)
        row = (batch * time + t) * heads + head
        nothing = tl.load(log_decay + row, mask=inside, other=0.0).to(tl.float32) <= FORGETS
        later = inside & (t + 1 < time)
        cut = tl.load(log_decay + row + heads, mask=later, other=0.0).to(tl.float32) <= FORGETS
        if RESET:
            nothing = nothing | (tl.load(reset + batch * time + t, mask=inside, other=0) != 0)
            cut = cut | (tl.load(reset + batch * time + t + 1, mask=later, other=0) != 0)
        total, was_cut = tl.associative_scan((change, cut.to(tl.int32)), 0, _join)
        total = total + tl.where(was_cut > 0, 0.0, carry)
        tl.store(gradient + row, tl.where(nothing, 0.0, total).to(gradient.dtype.element_ty), mask=inside)
        carry = last_of(total, BLOCK)
