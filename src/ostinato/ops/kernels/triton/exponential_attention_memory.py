"""The memory of `exponential_attention` in Triton: walks over time that keep it on chip, forward.

One program has a block of the memory C (key channels × value channels) of one (batch, head) in registers and walks
over a segment of time, a chunk at a time; see `exponential_attention_gates` for the weights of a chunk's tokens.
Arrays of matrices come as tensor descriptors, of (batch, heads, time, channels) and (batch · heads, chunks, key
channels, value channels).
Products of matrices are taken of the inputs' type and summed in float32. What is computed is rounded to `WIDE`
before it enters a product: bfloat16 for bfloat16 inputs, and again what that lost, as a product of its own; else
float32 (multiplied as tf32, whose digits are float16's, for float16; in full for float32).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import add_by_left, add_by_right, remainder
from ostinato.ops.kernels.triton.exponential_attention_gates import SIZES


@triton.jit
def load_tile(array, outer, inner, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The ROWS × COLUMNS from (row, column) of one matrix of a described array; zeros outside."""
    return tl.reshape(array.load([outer, inner, row, column]), [ROWS, COLUMNS])


@triton.jit
def store_tile(array, tile, outer, inner, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The counterpart of `load_tile`; what is outside is dropped."""
    array.store([outer, inner, row, column], tl.reshape(tile.to(array.dtype), [1, 1, ROWS, COLUMNS]))


@triton.jit
def load_matrix(array, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a contiguous matrix (rows × columns); zeros outside."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    at = array + r[:, None] * columns + c[None, :]
    return tl.load(at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0.0)


@triton.jit
def store_matrix(array, tile, row, column, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The counterpart of `load_matrix`."""
    r = row + tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    at = array + r[:, None] * columns + c[None, :]
    tl.store(at, tile.to(array.dtype.element_ty), mask=(r < rows)[:, None] & (c < columns)[None, :])


@triton.jit
def chunk_weights(
    decayed, reach, source, first_token, at, HAS_RESET: tl.constexpr, EXACT: tl.constexpr, LENGTH: tl.constexpr
):
    """W_ts = exp(reach_t − source_s) for the tokens s ≤ t of one sequence in the chunk that begins at `at`."""
    place = tl.arange(0, LENGTH)
    exponent = tl.load(reach + at + place)[:, None] - tl.load(source + at + place)[None, :]
    if EXACT:
        sums = tl.load(decayed + at + place)
        exponent += sums[:, None] - sums[None, :]
    kept = place[:, None] >= place[None, :]
    if HAS_RESET:
        since = tl.load(first_token + at + place)
        kept = kept & (place[None, :] >= since[:, None])
    return tl.exp2(tl.where(kept, exponent, float("-inf")))


@triton.jit(do_not_specialize=SIZES)
def states_kernel(
    left,
    right,
    gate,
    sum_gate,
    carried,
    initial,
    initial_sum,
    states,
    sums,
    last,
    last_sum,
    last_carried,
    heads,
    chunks,
    segment,
    segments,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    REVERSE: tl.constexpr,
    STORE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTH: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """S ← carried S + Σ_t left_t gate_t right_tᵀ and s ← carried s + Σ_t left_t sum_gate_t over chunks of a segment.

    From the first chunk to the last, or `REVERSE`. With `STORE`, every state is written before its chunk is added.
    `last`, `last_sum` (batch · heads, segments, …) receive the states at the end and `last_carried` the product of
    `carried`.
    """
    where = tl.program_id(0)
    row = where // segments
    part = where % segments
    key = tl.program_id(1) * BLOCK_KEYS
    value = tl.program_id(2) * BLOCK_VALUES
    batch = row // heads
    head = row % heads
    tokens = row.to(tl.int64) * chunks * LENGTH
    sums += row.to(tl.int64) * chunks * KEYS
    place = tl.arange(0, LENGTH)
    channel = key + tl.arange(0, BLOCK_KEYS)
    whole = where.to(tl.int64) * KEYS
    state = tl.zeros([BLOCK_KEYS, BLOCK_VALUES], tl.float32)
    total = tl.zeros([BLOCK_KEYS], tl.float32)
    if HAS_INITIAL:
        state += load_matrix(initial + whole * VALUES, key, value, KEYS, VALUES, BLOCK_KEYS, BLOCK_VALUES)
        total += tl.load(initial_sum + whole + channel, mask=channel < KEYS, other=0.0)
    product = 1.0
    begin = part * segment
    count = tl.minimum(segment, chunks - begin)
    for step in range(count):
        chunk = begin + step
        if REVERSE:
            chunk = begin + count - 1 - step
        token = chunk * LENGTH
        if STORE:
            store_tile(states, state, row, chunk, key, value, BLOCK_KEYS, BLOCK_VALUES)
            if value == 0:
                tl.store(sums + chunk * KEYS + channel, total, mask=channel < KEYS)
        a = load_tile(left, batch, head, token, key, LENGTH, BLOCK_KEYS)
        b = load_tile(right, batch, head, token, value, LENGTH, BLOCK_VALUES)
        scale = tl.load(gate + tokens + token + place)
        sum_scale = tl.load(sum_gate + tokens + token + place)
        kept = tl.load(carried + row * chunks + chunk)
        state = add_by_right(state * kept, tl.trans(a), b.to(tl.float32) * scale[:, None], WIDE, PRECISION, TWO)
        total = total * kept + tl.sum(a.to(tl.float32) * sum_scale[:, None], axis=0)
        product *= kept
    store_matrix(last + whole * VALUES, state, key, value, KEYS, VALUES, BLOCK_KEYS, BLOCK_VALUES)
    if value == 0:
        tl.store(last_sum + whole + channel, total, mask=channel < KEYS)
        if key == 0:
            tl.store(last_carried + where, product)


@triton.jit(do_not_specialize=SIZES)
def combine_kernel(
    initial,
    initial_sum,
    added,
    added_sum,
    carried,
    entering,
    entering_sum,
    segments,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The state that enters each segment, from what each adds to nothing: S ← carried S + added, a block of numbers."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    size: tl.constexpr = KEYS * VALUES
    state = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    if HAS_INITIAL:
        state += tl.load(initial + row * size + number, mask=number < size, other=0.0)
        total += tl.load(initial_sum + row * KEYS + number, mask=number < KEYS, other=0.0)
    for step in range(segments):
        part = row * segments + step
        if REVERSE:
            part = row * segments + segments - 1 - step
        tl.store(entering + part * size + number, state, mask=number < size)
        tl.store(entering_sum + part * KEYS + number, total, mask=number < KEYS)
        kept = tl.load(carried + part)
        state = state * kept + tl.load(added + part * size + number, mask=number < size, other=0.0)
        total = total * kept + tl.load(added_sum + part * KEYS + number, mask=number < KEYS, other=0.0)


@triton.jit(do_not_specialize=SIZES)
def outputs_kernel(
    queries,
    keys,
    values,
    decayed,
    reach,
    source,
    enter,
    leave,
    carried,
    maximum,
    first_token,
    initial,
    initial_sum,
    outputs,
    lost,
    inverse,
    side,
    last,
    last_sum,
    time,
    heads,
    chunks,
    segment,
    segments,
    eps,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_RESET: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    LENGTH: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h of a segment and of a block of value channels, and the last state.

    Also, for the gradients, 1 / (max(|den|, exp(−m)) + ε) and its derivative's side: sign(den) where |den| is the
    greater, else 0 (at a tie half, as torch.maximum has it); with TWO terms also `lost`, by h when it was rounded.
    """
    where = tl.program_id(1)
    row = where // segments
    part = where % segments
    value = tl.program_id(0) * BLOCK_VALUES
    batch = row // heads
    head = row % heads
    tokens = row.to(tl.int64) * chunks * LENGTH
    place = tl.arange(0, LENGTH)
    channel = tl.arange(0, BLOCK_KEYS)
    whole = where.to(tl.int64) * KEYS
    state = tl.zeros([BLOCK_KEYS, BLOCK_VALUES], tl.float32)
    total = tl.zeros([BLOCK_KEYS], tl.float32)
    if HAS_INITIAL:
        state += load_matrix(initial + whole * VALUES, 0, value, KEYS, VALUES, BLOCK_KEYS, BLOCK_VALUES)
        total += tl.load(initial_sum + whole + channel, mask=channel < KEYS, other=0.0)
    begin = part * segment
    for chunk in tl.range(begin, tl.minimum(begin + segment, chunks), num_stages=STAGES):
        token = chunk * LENGTH
        at = tokens + token
        q = load_tile(queries, batch, head, token, 0, LENGTH, BLOCK_KEYS)
        k = load_tile(keys, batch, head, token, 0, LENGTH, BLOCK_KEYS)
        v = load_tile(values, batch, head, token, value, LENGTH, BLOCK_VALUES)
        kept = tl.load(leave + at + place)
        through = tl.load(carried + row * chunks + chunk)
        grown = tl.load(enter + at + place)
        nothing = tl.zeros([LENGTH, BLOCK_VALUES], tl.float32)
        read = add_by_right(nothing, q, state, WIDE, PRECISION, TWO) * grown[:, None]
        weights = chunk_weights(decayed, reach, source, first_token, at, HAS_RESET, EXACT, LENGTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * weights
        numerator = add_by_left(read, scores, v, WIDE, PRECISION, TWO)
        denominator = tl.sum(scores, axis=1) + grown * tl.sum(q.to(tl.float32) * total[None, :], axis=1)
        # All is multiplied by exp(min(m, 0)), so that nothing overflows for m ≪ 0.
        now = tl.load(maximum + at + place).to(tl.float32)
        shift = tl.minimum(now, 0.0)
        scale = tl.exp(shift)
        size = tl.abs(denominator) * scale
        floor = tl.exp(shift - now)
        factor = tl.where(token + place < time, scale / (tl.maximum(size, floor) + eps * scale), 0.0)
        h = numerator * factor[:, None]
        store_tile(outputs, h, batch, head, token, value, LENGTH, BLOCK_VALUES)
        if TWO:
            store_tile(lost, remainder(h, h.to(outputs.dtype)), batch, head, token, value, LENGTH, BLOCK_VALUES)
        if value == 0:
            share = tl.where(size > floor, 1.0, tl.where(size == floor, 0.5, 0.0))
            signed = tl.where(denominator > 0, share, tl.where(denominator < 0, -share, 0.0))
            tl.store(inverse + at + place, factor)
            tl.store(side + at + place, signed)
        state = add_by_right(state * through, tl.trans(k), v.to(tl.float32) * kept[:, None], WIDE, PRECISION, TWO)
        total = total * through + tl.sum(k.to(tl.float32) * kept[:, None], axis=0)
    if part == segments - 1:
        final = row.to(tl.int64) * KEYS
        store_matrix(last + final * VALUES, state, 0, value, KEYS, VALUES, BLOCK_KEYS, BLOCK_VALUES)
        if value == 0:
            tl.store(last_sum + final + channel, total, mask=channel < KEYS)
