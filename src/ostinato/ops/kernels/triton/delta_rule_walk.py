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
are per channel.

One program holds a block of the state's value channels on chip through all chunks of a segment of the sequence. Where
that leaves processors idle, the sequence has several segments: each is a map S ↦ M S + B, walked once for B, from
zero, and once for M, from the identity without values; `enter` then finds the states that enter the segments.

In half precision the operands of every product are rounded once: S, dS', Y, P, βx, βdu, u and what is written, and
between the walks r and e. Each adds about as much to the error as rounding the result does, none more, and they add up
in squares. Where the memory decays, outputs (by P and u) and gradients (by r, P and dP) are so about √3 roundings
off. Taking u for P u in two parts, one product of 64 more, would leave the outputs at 1.5; the gradients of keys
would need r and dP in two parts, in all products of the last kernel, which is a fifth more operations. Where nothing
decays, errors of what is written stay in the state, and grow with the length until the keys' own erasing holds them.
The tf32 of the inverse has no part in it.

Source: Parallel DeltaNet (arXiv 2406.06484), section 3, without its W and U.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.delta_rule_parts import ASK, RATE, READ, ROWS, WRITE, offsets, places


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
        half = state.to(dtype)
        if KEEP:
            store_state(entering, chunk, key, value, half, K, V)
        excess = -read_factor * tl.dot(read, half, input_precision=PRECISION)
        value_offset = offsets(start, row, value, heads, V)
        if not TRANSITION:
            excess += tl.load(values + value_offset, mask=row_in & value_in, other=0.0).to(tl.float32)
        rate = tl.load(factor + RATE * C)[:, None]
        excess = tl.dot(solve, (-rate * excess).to(dtype), excess, input_precision=PRECISION)
        if KEEP:
            tl.store(fresh + value_offset, excess.to(dtype), mask=row_in & value_in)
        written = rate * excess
        if OUTPUT:
            query_offset = offsets(origin, token, key, heads, K)
            query = tl.load(queries + query_offset, mask=token_in & key_in, other=0.0)
            score = tl.load(scores + chunk * (BQ * C) + token[:, None] * C + row[None, :])
            query_factor = tl.load(factors + chunk * (ROWS * C) + ASK * C + token, mask=token < C, other=0.0)[:, None]
            output = query_factor * tl.dot(query, half, input_precision=PRECISION)
            output = tl.dot(score, written.to(dtype), output, input_precision=PRECISION)
            output_offset = offsets(origin, token, value, heads, V)
            tl.store(outputs + output_offset, output.to(dtype), mask=token_in & value_in)
        if CHANNELS:
            state *= tl.load(carried + chunk * K + key, mask=key < K, other=0.0)[:, None]
        else:
            state *= tl.load(carried + chunk)
        write = read if TIED else tl.load(writing + key_offset, mask=row_in & key_in, other=0.0)
        state = tl.dot(tl.trans(write), (write_factor * written).to(dtype), state, input_precision=PRECISION)
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
    """The walk from the last chunk to the first: writes e, and dS' of each chunk, with KEEP; dS of the first."""
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
        query_factor = tl.load(factors + chunk * (ROWS * C) + ASK * C + token, mask=token < C, other=0.0)[:, None]
        output_offset = offsets(origin, token, value, heads, V)
        grad_output = tl.load(grad_outputs + output_offset, mask=token_in & value_in, other=0.0)
        half = grad.to(dtype)
        if KEEP:
            store_state(leaving, chunk, key, value, half, K, V)
        written = write_factor * tl.dot(write, half, input_precision=PRECISION)
        written = tl.dot(tl.trans(score), grad_output, written, input_precision=PRECISION)
        rate = tl.load(factor + RATE * C)[:, None]
        target = tl.dot(tl.trans(solve), (-rate * written).to(dtype), written, input_precision=PRECISION)
        if KEEP:
            value_offset = offsets(start, row, value, heads, V)
            tl.store(residual + value_offset, target.to(dtype), mask=row_in & value_in)
        if CHANNELS:
            grad *= tl.load(carried + chunk * K + key, mask=key < K, other=0.0)[:, None]
        else:
            grad *= tl.load(carried + chunk)
        read = write if TIED else tl.load(reading + key_offset, mask=row_in & key_in, other=0.0)
        asked = (query_factor * grad_output.to(tl.float32)).to(dtype)
        grad = tl.dot(tl.trans(query), asked, grad, input_precision=PRECISION)
        grad = tl.dot(tl.trans(read), (-read_factor * rate * target).to(dtype), grad, input_precision=PRECISION)
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
