"""The walks of `linear_attention` with one decay per key channel: `by_key` and `by_value`.

With G_ic the sum of channel c's log-decays up to and with step i,
    y_i   = Σ_{j ≤ i} (Σ_c q_ic k_jc e^{G_ic − G_jc}) v_j        by_key
    dv_j  = Σ_{i ≥ j} (Σ_c k_jc q_ic e^{G_ic − G_jc}) dy_i       by_key, backwards in time
    dq_ic = Σ_{j ≤ i} (dy_i·v_j) e^{G_ic − G_jc} k_jc            by_value
    dk_jc = Σ_{i ≥ j} (v_j·dy_i) e^{G_ic − G_jc} q_ic            by_value, backwards in time
as in `linear_attention_walk`: readers, written and values in four roles, the state on chip.

In a chunk the decay of a pair is the product of a reader's factor and a written step's. If no channel forgets by
more than e^{−MILD} over the chunk, both are taken to the middle of the channel's range: e^{G_i − G_C/2} and
e^{G_C/2 − G_j} lie within e^{±MILD/2}, far from the ends of the types' range, and one product of matrices gives all
pairs. Else (strong decays) no positive exponent would do, and the chunk's lower triangle is cut in halves: the square
of the late half of a block against its early half goes through the border between them, with both exponents ≤ 0,
one product for all blocks of a size (`_by_halves…`).

The gradient of the log-decays is the flow of `linear_attention_walk`, for each channel; by_value cumulates it on its
way back.

Source: GLA (arXiv 2312.06635), sections 4.1 to 4.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS, load_steps, load_tile, store_tile
from ostinato.ops.kernels.triton.linear_attention_walk import state_block


@triton.jit
def _sums(which, of, FINE: tl.constexpr):
    """which @ of, where `which` holds zeros and ones: float32 with its own digits, or (not FINE) sixteen of them."""
    if FINE:
        return tl.dot(which.to(tl.float32), of, input_precision="ieee")
    high = of.to(tl.bfloat16)
    low = (of - high.to(tl.float32)).to(tl.bfloat16)
    chosen = which.to(tl.float32).to(tl.bfloat16)
    return tl.dot(chosen, high, acc=tl.dot(chosen, low))


@triton.jit
def _sums_of(of, which, FINE: tl.constexpr):
    """of @ which, in the same way."""
    if FINE:
        return tl.dot(of, which.to(tl.float32), input_precision="ieee")
    high = of.to(tl.bfloat16)
    low = (of - high.to(tl.float32)).to(tl.bfloat16)
    chosen = which.to(tl.float32).to(tl.bfloat16)
    return tl.dot(high, chosen, acc=tl.dot(low, chosen))


@triton.jit
def _load_log_decay(
    base,
    reset,
    start,
    stride,
    time,
    column,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RESET: tl.constexpr,
):
    g = load_tile(base, start, stride, time, column, WIDTH, ROWS, COLUMNS)
    g = tl.maximum(g.to(tl.float32), FORGETS)
    if RESET:
        g = tl.where((load_steps(reset, start, 1, time, ROWS) != 0)[:, None], 0.0, g)
    return g


@triton.jit
def _halving(step, size):
    """For blocks of 2 · size steps: which (t, s) with s between t and the border of the halves of t's block, on its
    own side and of those the border's far end; and which t are in the late half."""
    half = step // size
    late = half % 2 == 1
    to_border = tl.where(late[:, None], step[None, :] <= step[:, None], step[None, :] > step[:, None])
    return to_border & (half[:, None] == half[None, :]), late


@triton.jit
def _by_halves(
    x,
    z,
    g,
    scores,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    REVERSE: tl.constexpr,
    FINE: tl.constexpr,
    PRECISION: tl.constexpr,
    operand: tl.constexpr,
):
    """Decayed scores (written, readers) off the diagonal; `scores` has the diagonal."""
    step = tl.arange(0, ROWS)
    for level in range(LEVELS):
        size = 1 << level
        between, late = _halving(step, size)
        reads = late == 0 if REVERSE else late
        both = tl.where(reads[:, None], x, z) * tl.exp(_sums(between, g, FINE))
        both = both.to(operand)
        square = tl.dot(both, tl.trans(both), input_precision=PRECISION)
        block = step // (2 * size)
        here = (block[:, None] == block[None, :]) & (reads[:, None] == 0) & reads[None, :]
        scores = tl.where(here, square, scores)
    return scores


@triton.jit
def _by_halves_of_values(
    u,
    g,
    scores,
    y,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    REVERSE: tl.constexpr,
    FINE: tl.constexpr,
    PRECISION: tl.constexpr,
    operand: tl.constexpr,
):
    """y (value, readers) plus the outputs of `scores` (written, readers) off the diagonal; u and g are transposed."""
    step = tl.arange(0, ROWS)
    for level in range(LEVELS):
        size = 1 << level
        between, late = _halving(step, size)
        reads = late == 0 if REVERSE else late
        factor = tl.exp(_sums_of(g, tl.trans(between), FINE))
        block = step // (2 * size)
        here = (block[:, None] == block[None, :]) & (reads[:, None] == 0) & reads[None, :]
        part = tl.dot((u * factor).to(operand), tl.where(here, scores, 0.0).to(operand), input_precision=PRECISION)
        y += part * factor
    return y


@triton.jit
def by_key(
    readers,
    written,
    values,
    log_decay,
    reset,
    parts,
    initial,
    outputs,
    last,
    kept,
    time,
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
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    RESET: tl.constexpr,
    INITIAL: tl.constexpr,
    LAST: tl.constexpr,
    OUTPUTS: tl.constexpr,
    FINE: tl.constexpr,
    WIDE: tl.constexpr,
    MILD: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Channels of readers and written decay. The state lies in memory as (key, value).

    With OUTPUTS false: only what a segment adds to the state, and how much of each key channel it keeps.
    """
    blocks = (VALUE_DIM + BV - 1) // BV
    segments = tl.num_programs(1)
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    sequence = program // blocks
    segment = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    first = (block * BV).to(tl.int32)
    readers += batch * readers_batch + head * readers_head
    written += batch * written_batch + head * written_head
    values += batch * values_batch + head * values_head
    log_decay += (batch * time * heads + head) * KEY_DIM
    outputs += (batch * time * heads + head) * VALUE_DIM
    reset += batch * time
    parts += batch * time

    place, inside = state_block(first, BV, BK, VALUE_DIM, 1, KEY_DIM, VALUE_DIM)
    place = (sequence * segments + segment) * (KEY_DIM * VALUE_DIM) + place
    if INITIAL:
        state = tl.load(initial + place, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BV, BK], dtype=tl.float32)
    operand: tl.constexpr = tl.float32 if WIDE else values.dtype.element_ty
    step = tl.arange(0, ROWS)
    if REVERSE:
        causal = step[:, None] >= step[None, :]
    else:
        causal = step[:, None] <= step[None, :]
    whole = tl.zeros([BK], dtype=tl.float32)
    count = tl.minimum(chunks, (time + ROWS - 1) // ROWS - segment * chunks).to(tl.int32)
    for index in tl.range(0, count, num_stages=STAGES):
        if REVERSE:
            start = ((segment * chunks + count - 1 - index) * ROWS).to(tl.int32)
        else:
            start = ((segment * chunks + index) * ROWS).to(tl.int32)
        g = _load_log_decay(log_decay, reset, start, heads * KEY_DIM, time, 0, KEY_DIM, ROWS, BK, RESET)
        z = load_tile(written, start, written_time, time, 0, KEY_DIM, ROWS, BK)
        u = tl.trans(load_tile(values, start, values_time, time, first, VALUE_DIM, ROWS, BV))
        of_chunk = tl.sum(g, axis=0)
        least = tl.min(of_chunk, axis=0)
        mild = least > -MILD
        total = _sums(step[:, None] >= step[None, :], g, FINE)
        to_end = tl.where(mild, 0.5, 0.0) * of_chunk
        if mild:
            rest = to_end[None, :] - total
        else:
            rest = _sums(step[:, None] < step[None, :], g, FINE)
        total -= to_end[None, :]
        if REVERSE:
            wrote = (z * tl.exp(total)).to(operand)
        else:
            wrote = (z * tl.exp(rest)).to(operand)
        state = state * tl.exp(to_end)[None, :]
        if OUTPUTS:
            x = load_tile(readers, start, readers_time, time, 0, KEY_DIM, ROWS, BK)
            if REVERSE:
                read = (x * tl.exp(rest)).to(operand)
            else:
                read = (x * tl.exp(total)).to(operand)
            scores = tl.dot(wrote, tl.trans(read), input_precision=PRECISION)
            if least <= -MILD:
                own = tl.dot(z, tl.trans(x), input_precision=PRECISION)
                own = tl.where(step[:, None] == step[None, :], own, 0.0)
                scores = _by_halves(x, z, g, own, ROWS, LEVELS, REVERSE, FINE, PRECISION, operand)
            keep = causal
            y = tl.dot(state.to(operand), tl.trans(read), input_precision=PRECISION)
            if RESET:
                part = load_steps(parts, start, 1, time, ROWS)
                keep = keep & (part[:, None] == part[None, :])
                if REVERSE:
                    ends = tl.load(parts + tl.minimum(start + ROWS, time) - 1)
                    y = tl.where((part == ends)[None, :], y, 0.0)
                else:
                    y = tl.where((part == 0)[None, :], y, 0.0)
            scores = tl.where(keep, scores, 0.0)
            y = tl.dot(u.to(operand), scores.to(operand), acc=y, input_precision=PRECISION)
            store_tile(outputs, start, heads * VALUE_DIM, time, first, tl.trans(y), VALUE_DIM, ROWS, BV)

        state = state * tl.exp(tl.where(mild, 0.0, 1.0) * of_chunk)[None, :]
        added = u
        if RESET:
            parted = load_steps(parts, start, 1, time, ROWS)
            count_parts = tl.load(parts + tl.minimum(start + ROWS, time) - 1)
            state = state * tl.where(count_parts == 0, 1.0, 0.0)
            whole += tl.where(count_parts == 0, 0.0, 2.0 * FORGETS)
            if REVERSE:
                added = tl.where((parted == 0)[None, :], u, tl.zeros_like(u))
            else:
                added = tl.where((parted == count_parts)[None, :], u, tl.zeros_like(u))
        state = tl.dot(added.to(operand), wrote, acc=state, input_precision=PRECISION)
        state = state * tl.exp(to_end)[None, :]
        whole += of_chunk

    if LAST:
        tl.store(last + place, state, mask=inside)
    if (not OUTPUTS) and block == 0:
        key = tl.arange(0, BK)
        tl.store(kept + (sequence * segments + segment) * KEY_DIM + key, tl.exp(whole), mask=key < KEY_DIM)


@triton.jit
def by_value(
    readers,
    written,
    values,
    beside,
    log_decay,
    reset,
    parts,
    initial,
    outputs,
    products,
    flow,
    gradient,
    last,
    time,
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
    beside_batch,
    beside_time,
    beside_head,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSE: tl.constexpr,
    RESET: tl.constexpr,
    INITIAL: tl.constexpr,
    FINE: tl.constexpr,
    WIDE: tl.constexpr,
    MILD: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Channels of values and outputs decay. The state lies in memory as (value, key).

    Forwards: `products` is set to beside ⊙ outputs, without the pair of a step with itself, and the last state is
    without what the last step wrote. Backwards, the gradient of the log-decays is cumulated of products − beside ⊙
    outputs, from `flow` at the end.
    """
    blocks = (VALUE_DIM + BV - 1) // BV
    segments = tl.num_programs(1)
    program = tl.program_id(0).to(tl.int64)
    block = program % blocks
    sequence = program // blocks
    segment = tl.program_id(1).to(tl.int64)
    batch, head = sequence // heads, sequence % heads
    first = (block * BV).to(tl.int32)
    readers += batch * readers_batch + head * readers_head
    written += batch * written_batch + head * written_head
    values += batch * values_batch + head * values_head
    beside += batch * beside_batch + head * beside_head
    own_rows = (batch * time * heads + head) * VALUE_DIM
    log_decay += own_rows
    outputs += own_rows
    gradient += own_rows
    products += sequence * time * VALUE_DIM
    reset += batch * time
    parts += batch * time

    place, inside = state_block(first, BV, BK, 1, KEY_DIM, KEY_DIM, VALUE_DIM)
    place = (sequence * segments + segment) * (KEY_DIM * VALUE_DIM) + place
    channel = first + tl.arange(0, BV)
    carry = tl.zeros([BV], dtype=tl.float32)
    if INITIAL:
        state = tl.load(initial + place, mask=inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BV, BK], dtype=tl.float32)
    if REVERSE and INITIAL:
        at = flow + (sequence * segments + segment) * VALUE_DIM + channel
        carry = tl.load(at, mask=channel < VALUE_DIM, other=0.0)
        # What the last step reads of the last state's gradient, in this program if it has that step.
        key, final = tl.arange(0, BK), time - 1
        has_end = (key < KEY_DIM) & (segment == segments - 1)
        reader = tl.load(readers + final.to(tl.int64) * readers_time + key, mask=has_end, other=0.0)
        read_of_end = tl.sum(state * reader.to(tl.float32)[None, :], axis=1)

    operand: tl.constexpr = tl.float32 if WIDE else values.dtype.element_ty
    step = tl.arange(0, ROWS)
    if REVERSE:
        causal = step[:, None] > step[None, :]
    else:
        causal = step[:, None] < step[None, :]
    count = tl.minimum(chunks, (time + ROWS - 1) // ROWS - segment * chunks).to(tl.int32)
    for index in tl.range(0, count, num_stages=STAGES):
        if REVERSE:
            start = ((segment * chunks + count - 1 - index) * ROWS).to(tl.int32)
        else:
            start = ((segment * chunks + index) * ROWS).to(tl.int32)
        row = heads * VALUE_DIM
        g = tl.trans(_load_log_decay(log_decay, reset, start, row, time, first, VALUE_DIM, ROWS, BV, RESET))
        x = load_tile(readers, start, readers_time, time, 0, KEY_DIM, ROWS, BK)
        z = load_tile(written, start, written_time, time, 0, KEY_DIM, ROWS, BK)
        u = tl.trans(load_tile(values, start, values_time, time, first, VALUE_DIM, ROWS, BV)).to(tl.float32)
        w = tl.trans(load_tile(beside, start, beside_time, time, first, VALUE_DIM, ROWS, BV)).to(tl.float32)
        at_end = start + step == time - 1

        of_chunk = tl.sum(g, axis=1)
        least = tl.min(of_chunk, axis=0)
        mild = least > -MILD
        total = _sums_of(g, step[:, None] <= step[None, :], FINE)
        to_end = tl.where(mild, 0.5, 0.0) * of_chunk
        if mild:
            rest = to_end[:, None] - total
        else:
            rest = _sums_of(g, step[:, None] > step[None, :], FINE)
        total -= to_end[:, None]
        state = state * tl.exp(to_end)[:, None]

        scores = tl.dot(z, tl.trans(x), input_precision=PRECISION)
        own = tl.sum(tl.where(step[:, None] == step[None, :], scores, 0.0), axis=0)
        keep = causal
        if RESET:
            part = load_steps(parts, start, 1, time, ROWS)
            count_parts = tl.load(parts + tl.minimum(start + ROWS, time) - 1)
            keep = keep & (part[:, None] == part[None, :])
        scores = tl.where(keep, scores, 0.0)
        y = tl.dot(state.to(operand), tl.trans(x).to(operand), input_precision=PRECISION)
        reads = start + step >= 0
        if RESET:
            if REVERSE:
                reads = part == count_parts
            else:
                reads = part == 0
        if REVERSE and INITIAL:
            reads = reads & (at_end == 0)
        if RESET or (REVERSE and INITIAL):
            y = tl.where(reads[None, :], y, 0.0)
        if REVERSE:
            wrote = u * tl.exp(total)
        else:
            wrote = u * tl.exp(rest)
            wrote = tl.where(at_end[None, :], 0.0, wrote)
        paired = tl.where(mild, scores, 0.0)
        y = tl.dot(wrote.to(operand), paired.to(operand), acc=y, input_precision=PRECISION)
        if REVERSE:
            y = y * tl.exp(rest)
        else:
            y = y * tl.exp(total)
        if least <= -MILD:
            y = _by_halves_of_values(u, g, scores, y, ROWS, LEVELS, REVERSE, FINE, PRECISION, operand)

        product = y * w
        y = y + own[None, :] * u
        if REVERSE and INITIAL:
            y = y + tl.where(at_end[None, :], read_of_end[:, None], 0.0)
        store_tile(outputs, start, row, time, first, tl.trans(y), VALUE_DIM, ROWS, BV)
        if REVERSE:
            change = load_tile(products, start, VALUE_DIM, time, first, VALUE_DIM, ROWS, BV)
            change = tl.trans(change) - product
            later = step[:, None] >= step[None, :]
            if RESET:
                later = later & (part[:, None] == part[None, :])
            cumulated = _sums_of(change, later, FINE)
            if RESET:
                cumulated += tl.where((part == count_parts)[None, :], carry[:, None], 0.0)
                carry = tl.where(count_parts == 0, carry, 0.0)
                carry += tl.sum(tl.where((part == 0)[None, :], change, 0.0), axis=1)
                is_reset = load_steps(reset, start, 1, time, ROWS) != 0
                cumulated = tl.where(is_reset[None, :], 0.0, cumulated)
            else:
                cumulated += carry[:, None]
                carry += tl.sum(change, axis=1)
            cumulated = tl.where(g <= FORGETS, 0.0, cumulated)
            store_tile(gradient, start, row, time, first, tl.trans(cumulated), VALUE_DIM, ROWS, BV)
        else:
            store_tile(products, start, VALUE_DIM, time, first, tl.trans(product), VALUE_DIM, ROWS, BV)

        state = state * tl.exp(tl.where(mild, 0.0, 1.0) * of_chunk)[:, None]
        if RESET:
            state = state * tl.where(count_parts == 0, 1.0, 0.0)
            if REVERSE:
                wrote = tl.where((part == 0)[None, :], wrote, 0.0)
            else:
                wrote = tl.where((part == count_parts)[None, :], wrote, 0.0)
        state = tl.dot(wrote.to(operand), z.to(operand), acc=state, input_precision=PRECISION)
        state = state * tl.exp(to_end)[:, None]

    if not REVERSE:
        tl.store(last + place, state, mask=inside)
