"""The walks of `delta_rule` from chunk to chunk, forwards with the state and backwards with its gradient.

In a chunk of C rows (a token has n rows) let S be the state that enters, Y = A'(I + βA')⁻¹ with A' the decayed scores
of the keys, and P those of the queries (both made for all chunks at once, by `delta_rule_chunks`). Row factors a, b, β
and c carry decays, rates and the lengths of keys and queries, so that the tiles of keys and queries go from memory
to the matrix units untouched:

    x = v − a (k S),    r = x − Y (β x),    u = β r,    y = c (q S) + P u,    S' = d S + kᵀ (b u).

r is what the values are too large by against what is stored under their keys. With dS' the gradient of the state that
leaves, and dy of the outputs,

    du = Pᵀ dy + b (k dS'),    e = du − Yᵀ (β du),    dS = d dS' + qᵀ (c dy) − kᵀ (a β e),

and β e is the gradient of v, e·r that of β. `reading` and `writing` are the keys, or two forms of them where decays
are per channel. They are scaled, k = m k̃, q = m' q̃, and so are Y = m Ỹ m and P = m' P̃ m; the walks hold x / m and
r / m, u m and e / m, of which the same formulas hold with β m² for β.

One program holds a block of the state's value channels on chip through all chunks of a segment of the sequence. Where
that leaves processors idle, the sequence has several segments: each is a map S ↦ M S + B, walked once for B, from
zero, and once for M, from the identity without values; `enter` then finds the states that enter the segments.

In half precision the operands of every product are rounded once: S, dS', Y, P, βx, βdu, u, c dy and what is written,
and between the walks r and e. Each adds about as much to the error as rounding the result to their type does, or a
little more where nothing decays and errors of what is written stay in the state, until the keys' own erasing holds
them; and they add up in squares. As bfloat16 they left gradients 1.9 roundings of the result off, 4.7 where nothing
decays. As float16 each is an eighth of that, and all together 1.02 and 1.2 roundings, the result's own included.

Source: Parallel DeltaNet (arXiv 2406.06484), section 3, without its W and U.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.delta_rule_parts import (
    ASK,
    ENTERING,
    FRESH,
    GROWS,
    LEAVING,
    LITTLE,
    QUERY,
    RATE,
    READ,
    RESIDUAL,
    ROWS,
    TOP,
    VALUE,
    WRITE,
    narrowed,
    offsets,
    places,
    tile_scale,
    unit_of,
)


@triton.jit
def load_state(pointer, index, key, value, K: tl.constexpr, V: tl.constexpr):
    """A block of state `index` of contiguous (…, K, V), zeros beyond its edges."""
    inside = (key < K)[:, None] & (value < V)[None, :]
    return tl.load(pointer + index * (K * V) + key[:, None] * V + value[None, :], mask=inside, other=0.0)


@triton.jit
def store_state(pointer, index, key, value, state, K: tl.constexpr, V: tl.constexpr):
    """The inverse of `load_state`; rounds to the type of `pointer`."""
    inside = (key < K)[:, None] & (value < V)[None, :]
    place = pointer + index * (K * V) + key[:, None] * V + value[None, :]
    tl.store(place, state.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def walk(
    queries,
    reading,
    writing,
    values,
    inverse,
    scores,
    factors,
    carried,
    initial,
    outputs,
    final,
    entering,
    fresh,
    units,
    tokens,
    heads,
    chunks,
    per_segment,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    MICRO: tl.constexpr,
    BQ: tl.constexpr,
    OUTPUT: tl.constexpr,
    KEEP: tl.constexpr,
    INITIAL: tl.constexpr,
    TRANSITION: tl.constexpr,
    TIED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid: (value blocks, batch × heads, segments of `per_segment` chunks).

    OUTPUT writes y. KEEP writes the states that enter the chunks and r. With TRANSITION the values are zero and
    the state starts as the identity, so that the last state is the segment's transition matrix (V = K). TIED says that
    one key reads and writes, CHANNELS that each key channel has a factor d of its own.
    """
    pair = tl.program_id(1)
    segment = tl.program_id(2)
    segments = tl.num_programs(2)
    dtype = reading.dtype.element_ty
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    key_in = (key < K)[None, :]
    value_in = (value < V)[None, :]
    place = pair.to(tl.int64) * segments + segment
    if TRANSITION:
        state = (key[:, None] == value[None, :]).to(tl.float32)
    elif INITIAL:
        state = load_state(initial, place, key, value, K, V).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], tl.float32)

    # What `state` is to be multiplied by to be S: it stays in the units of what was last added to it.
    one = tl.full([], 1.0, tl.float32)
    held = one
    first = segment * per_segment
    count = pair.to(tl.int64) * chunks
    for n in tl.range(first, tl.minimum(first + per_segment, chunks), num_stages=STAGES):
        chunk = count + n
        _, start, origin, row_in, token_in = places(n, pair, tokens, heads, C, MICRO, BQ)
        row_in, token_in = row_in[:, None], token_in[:, None]
        key_offset = offsets(start, row, key, heads, K)
        read = tl.load(reading + key_offset, mask=row_in & key_in, other=0.0)
        solve = tl.load(inverse + chunk * (C * C) + row[:, None] * C + row[None, :])
        factor = factors + chunk * (ROWS * C) + row
        read_factor = tl.load(factor + READ * C)[:, None]
        write_factor = tl.load(factor + WRITE * C)[:, None]
        value_factor = tl.load(factor + VALUE * C)[:, None]
        half, unit = narrowed(state, dtype)
        unit *= held
        if KEEP:
            store_state(entering, chunk, key, value, half, K, V)
            tl.store(unit_of(units, chunk, tl.num_programs(0), tl.program_id(0), ENTERING), unit)
        excess = -(read_factor * unit) * tl.dot(read, half, input_precision=PRECISION)
        value_offset = offsets(start, row, value, heads, V)
        if not TRANSITION:
            new = tl.load(values + value_offset, mask=row_in & value_in, other=0.0)
            excess += value_factor * new.to(tl.float32)
        # From here on in units of x, so that sums stay in the matrix units: r, u, y and S', each times `scale`.
        rate = tl.load(factor + RATE * C)[:, None]
        scale, excess_unit = tile_scale(rate * excess, unit * LITTLE, dtype, GROWS)
        excess *= scale
        excess = tl.dot(solve, (-rate * excess).to(dtype), excess, input_precision=PRECISION)
        if KEEP:
            kept, kept_unit = narrowed(excess / value_factor, dtype)
            tl.store(fresh + value_offset, kept, mask=row_in & value_in)
            place_of_unit = unit_of(units, chunk, tl.num_programs(0), tl.program_id(0), FRESH)
            tl.store(place_of_unit, kept_unit * excess_unit)
        written = rate * excess
        if OUTPUT:
            query_offset = offsets(origin, token, key, heads, K)
            query = tl.load(queries + query_offset, mask=token_in & key_in, other=0.0)
            score = tl.load(scores + chunk * (BQ * C) + token[:, None] * C + row[None, :])
            query_factor = factors + chunk * (ROWS * C) + token
            asked = tl.load(query_factor + ASK * C, mask=token < C, other=0.0)[:, None]
            output = (asked * (unit * scale)) * tl.dot(query, half, input_precision=PRECISION)
            output = tl.dot(score, written.to(dtype), output, input_precision=PRECISION)
            output *= tl.load(query_factor + QUERY * C, mask=token < C, other=0.0)[:, None] * excess_unit
            output_offset = offsets(origin, token, value, heads, V)
            tl.store(outputs + output_offset, output.to(outputs.dtype.element_ty), mask=token_in & value_in)
        if CHANNELS:
            state *= (tl.load(carried + chunk * K + key, mask=key < K, other=0.0) * (held * scale))[:, None]
        else:
            state *= tl.load(carried + chunk) * (held * scale)
        write = read if TIED else tl.load(writing + key_offset, mask=row_in & key_in, other=0.0)
        state = tl.dot(tl.trans(write), (write_factor * written).to(dtype), state, input_precision=PRECISION)
        held = one * excess_unit
    state *= held
    store_state(final, place, key, value, state, K, V)


@triton.jit
def walk_back(
    queries,
    reading,
    writing,
    grad_outputs,
    inverse,
    scores,
    factors,
    carried,
    grad_final,
    grad_initial,
    leaving,
    residual,
    grad_values,
    units,
    tokens,
    heads,
    chunks,
    per_segment,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    MICRO: tl.constexpr,
    BQ: tl.constexpr,
    KEEP: tl.constexpr,
    FINAL: tl.constexpr,
    TIED: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The walk from the last chunk to the first: with KEEP writes e, dS' of each chunk and dv; dS of the first."""
    pair = tl.program_id(1)
    segment = tl.program_id(2)
    segments = tl.num_programs(2)
    dtype = reading.dtype.element_ty
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    key_in = (key < K)[None, :]
    value_in = (value < V)[None, :]
    place = pair.to(tl.int64) * segments + segment
    if FINAL:
        grad = load_state(grad_final, place, key, value, K, V).to(tl.float32)
    else:
        grad = tl.zeros([BK, BV], tl.float32)

    # What `grad` is to be multiplied by to be dS: it stays in the units of what was last added to it.
    one = tl.full([], 1.0, tl.float32)
    held = one
    first = segment * per_segment
    last = tl.minimum(first + per_segment, chunks)
    count = pair.to(tl.int64) * chunks
    for back in tl.range(0, last - first, num_stages=STAGES):
        n = last - 1 - back
        chunk = count + n
        _, start, origin, row_in, token_in = places(n, pair, tokens, heads, C, MICRO, BQ)
        row_in, token_in = row_in[:, None], token_in[:, None]
        key_offset = offsets(start, row, key, heads, K)
        write = tl.load(writing + key_offset, mask=row_in & key_in, other=0.0)
        solve = tl.load(inverse + chunk * (C * C) + row[:, None] * C + row[None, :])
        factor = factors + chunk * (ROWS * C) + row
        read_factor = tl.load(factor + READ * C)[:, None]
        write_factor = tl.load(factor + WRITE * C)[:, None]
        query_offset = offsets(origin, token, key, heads, K)
        query = tl.load(queries + query_offset, mask=token_in & key_in, other=0.0)
        score = tl.load(scores + chunk * (BQ * C) + token[:, None] * C + row[None, :])
        query_factor = factors + chunk * (ROWS * C) + token
        ask_factor = tl.load(query_factor + ASK * C, mask=token < C, other=0.0)[:, None]
        output_offset = offsets(origin, token, value, heads, V)
        grad_output = tl.load(grad_outputs + output_offset, mask=token_in & value_in, other=0.0).to(tl.float32)
        grad_output *= tl.load(query_factor + QUERY * C, mask=token < C, other=0.0)[:, None]
        half, unit = narrowed(grad, dtype)
        unit *= held
        if KEEP:
            store_state(leaving, chunk, key, value, half, K, V)
            tl.store(unit_of(units, chunk, tl.num_programs(0), tl.program_id(0), LEAVING), unit)
        # From here on in units of dy, then in those of du too, so that sums stay in the matrix units.
        scale, output_unit = tile_scale(grad_output, unit * LITTLE, dtype, TOP)
        grad_output *= scale
        written = (write_factor * (unit * scale)) * tl.dot(write, half, input_precision=PRECISION)
        written = tl.dot(tl.trans(score), grad_output.to(dtype), written, input_precision=PRECISION)
        if CHANNELS:
            grad *= (tl.load(carried + chunk * K + key, mask=key < K, other=0.0) * (held * scale))[:, None]
        else:
            grad *= tl.load(carried + chunk) * (held * scale)
        grad = tl.dot(tl.trans(query), (ask_factor * grad_output).to(dtype), grad, input_precision=PRECISION)
        rate = tl.load(factor + RATE * C)[:, None]
        scale, target_unit = tile_scale(rate * written, tl.maximum(unit * scale, 1.0) * LITTLE, dtype, GROWS)
        written *= scale
        target = tl.dot(tl.trans(solve), (-rate * written).to(dtype), written, input_precision=PRECISION)
        if KEEP:
            value_offset = offsets(start, row, value, heads, V)
            kept, kept_unit = narrowed(target, dtype)
            tl.store(residual + value_offset, kept, mask=row_in & value_in)
            place_of_unit = unit_of(units, chunk, tl.num_programs(0), tl.program_id(0), RESIDUAL)
            tl.store(place_of_unit, kept_unit * target_unit * output_unit)
            to_value = (rate * tl.load(factor + VALUE * C)[:, None]) * (target * (target_unit * output_unit))
            tl.store(grad_values + value_offset, to_value.to(grad_values.dtype.element_ty), mask=row_in & value_in)
        read = write if TIED else tl.load(reading + key_offset, mask=row_in & key_in, other=0.0)
        grad *= scale
        grad = tl.dot(tl.trans(read), (-read_factor * rate * target).to(dtype), grad, input_precision=PRECISION)
        held = one * target_unit * output_unit
    grad *= held
    store_state(grad_initial, place, key, value, grad, K, V)


@triton.jit
def enter(
    transitions,
    added,
    initial,
    entering,
    final,
    segments,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    INITIAL: tl.constexpr,
    BACK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """S ← M S + B from segment to segment; BACK: S ← Mᵀ S + B from the last on. Grid: (value blocks, batch × heads)."""
    pair = tl.program_id(1).to(tl.int64)
    key = tl.arange(0, BK)
    value = tl.program_id(0) * BV + tl.arange(0, BV)
    if INITIAL:
        state = load_state(initial, pair, key, value, K, V).to(tl.float32)
    else:
        state = tl.zeros([BK, BV], tl.float32)
    for step in tl.range(0, segments, num_stages=2):
        place = pair * segments + (segments - 1 - step if BACK else step)
        store_state(entering, place, key, value, state, K, V)
        transition = load_state(transitions, place, key, key, K, K)
        transition = tl.trans(transition) if BACK else transition
        state = tl.dot(transition, state, load_state(added, place, key, value, K, V), input_precision=PRECISION)
    store_state(final, pair, key, value, state, K, V)
