"""What `delta_rule` does inside its chunks, all chunks at once, where the decay is one number per head or none.

Keys and queries are multiplied scaled, and what makes good for it is in the factors (`delta_rule_parts`); in the
formulas here they are what they stand for.

Before the walk (`delta_rule_walk`): with D_ij = exp(G_i − G_j), G the log-decays summed up from the chunk's start, and
keys and queries of unit length where that is asked,

    A_ij = D_ij k_i·k_j for j < i,    Y = A (I + βA)⁻¹,    P_tj = D_tj q_t·k_j for token(j) ≤ t.

After the walk back, with the walk's S, dS', r and e: y = P u + … and r = v − A u − …, u = β r, so that

    dP = dy uᵀ,    dA = −β e uᵀ,    dv = β e,    dβ = Σ e r,

and the gradients of keys, queries and decays are those of the formulas above. The gradient of G_i is what row i of A
and P weighs, less what column i weighs; that of a log-decay sums over the rows from its own on.

Source: Parallel DeltaNet (arXiv 2406.06484), section 3 and appendix; Gated DeltaNet (arXiv 2412.06464), section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS, last_of
from ostinato.ops.kernels.triton.delta_rule_parts import (
    ASK,
    ENTERING,
    FRESH,
    LEAVING,
    QUERY,
    QUERY_SCALE,
    RATE,
    READ,
    READ_SCALE,
    RESIDUAL,
    ROWS,
    VALUE,
    WRITE,
    load_rates,
    narrowed,
    offsets,
    places,
    row_scales,
    segments,
    solved_scores,
    unit_of,
)


@triton.jit
def token_decays(log_decay, reset, position, place, taken, DECAY: tl.constexpr, RESET: tl.constexpr):
    """Log-decays and the numbers of segments at `position` of a chunk; (0, 0) where not `taken`."""
    decay = tl.zeros(position.shape, tl.float32)
    if DECAY:
        decay = tl.maximum(tl.load(log_decay + place, mask=taken, other=0.0).to(tl.float32), FORGETS)
    segment, begins = segments(reset, position, taken, RESET)
    if RESET:
        decay = tl.where(begins > 0, 0.0, decay)
    return decay, segment


@triton.jit
def pair_decays(decay, later, earlier, kept, total, other_total, EXACT: tl.constexpr, DECAY: tl.constexpr):
    """exp of the log-decays from after token `earlier` up to token `later`, 0 where not `kept`.

    With EXACT they are summed up for each pair, so that weak decays after strong ones keep their digits; else
    the sums from the chunk's start are subtracted.
    """
    if DECAY:
        if EXACT:
            exponent = tl.cumsum(tl.where(later > earlier, decay[:, None], 0.0), 0)
        else:
            exponent = total[:, None] - other_total[None, :]
        return tl.where(kept, tl.exp(tl.where(kept, exponent, 0.0)), 0.0)
    return kept.to(tl.float32)


@triton.jit
def row_decays(decay, segment, row_token, C: tl.constexpr, EXACT: tl.constexpr, DECAY: tl.constexpr):
    """Of a chunk's rows: the log-decays' sums, what is left of the entering state, and of the row at the end."""
    total = tl.cumsum(decay, 0)
    whole = last_of(total, C)
    last_segment = last_of(segment, C)
    if DECAY:
        entered = tl.exp(total)
        if EXACT:
            rest = tl.cumsum(tl.where(row_token[:, None] > row_token[None, :], decay[:, None], 0.0), 0)
            left = tl.exp(tl.sum(tl.where(tl.arange(0, C)[:, None] == C - 1, rest, 0.0), 0))
        else:
            left = tl.exp(whole - total)
        through = tl.exp(whole)
    else:
        entered = tl.full([C], 1.0, tl.float32)
        left = tl.full([C], 1.0, tl.float32)
        through = 1.0
    entered = tl.where(segment == 0, entered, 0.0)
    left = tl.where(segment == last_segment, left, 0.0)
    through = tl.where(last_segment == 0, through, 0.0)
    return total, entered, left, through


@triton.jit
def prepare(
    queries,
    keys,
    beta,
    log_decay,
    reset,
    inverse,
    scores,
    factors,
    carried,
    asking,
    reading,
    tokens,
    heads,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    MICRO: tl.constexpr,
    BQ: tl.constexpr,
    BETA: tl.constexpr,
    DECAY: tl.constexpr,
    RESET: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """Y, P, the factors, and queries and keys as they are multiplied, of every chunk. Grid: (chunks, batch × heads)."""
    n = tl.program_id(0)
    pair = tl.program_id(1)
    chunk = pair.to(tl.int64) * chunks + n
    first, start, origin, row_in, token_in = places(n, pair, tokens, heads, C, MICRO, BQ)
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    row_token = row // MICRO

    begins = row_in & (row % MICRO == 0)
    flags = reset + first
    decay, segment = token_decays(log_decay + origin, flags, row_token, row_token * heads, begins, DECAY, RESET)
    total, entered, left, through = row_decays(decay, segment, row_token, C, EXACT, DECAY)
    if MICRO == 1:
        query_decay = decay
        query_segment = segment
        query_total = total
    else:
        query_decay, query_segment = token_decays(
            log_decay + origin, flags, token, token * heads, token_in, DECAY, RESET
        )
        query_total = tl.cumsum(query_decay, 0)

    key_in = (key < K)[None, :]
    key_offset = offsets(start, row, key, heads, K)
    query_offset = offsets(origin, token, key, heads, K)
    dtype = reading.dtype.element_ty
    k = tl.load(keys + key_offset, mask=row_in[:, None] & key_in, other=0.0)
    key_scale, key_factor = row_scales(k, dtype, C, NORMALIZE)
    k = (k.to(tl.float32) * key_scale[:, None]).to(dtype)
    tl.store(reading + key_offset, k, mask=row_in[:, None] & key_in)
    rate = load_rates(beta, start, row, row_in, heads, BETA) * key_factor * key_factor

    kept = (row[:, None] > row[None, :]) & (segment[:, None] == segment[None, :])
    lower = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    lower *= pair_decays(decay, row_token[:, None], row_token[None, :], kept, total, total, EXACT, DECAY)
    lower = tl.where(kept, lower, 0.0)
    solved = solved_scores(lower, rate, C, SOLVE)
    place = inverse + chunk * (C * C) + row[:, None] * C + row[None, :]
    tl.store(place, solved.to(inverse.dtype.element_ty))

    q = tl.load(queries + query_offset, mask=token_in[:, None] & key_in, other=0.0)
    query_scale, query_factor = row_scales(q, dtype, BQ, NORMALIZE)
    q = (q.to(tl.float32) * query_scale[:, None]).to(dtype)
    tl.store(asking + query_offset, q, mask=token_in[:, None] & key_in)
    kept = (token[:, None] >= row_token[None, :]) & (query_segment[:, None] == segment[None, :])
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    score *= pair_decays(query_decay, token[:, None], row_token[None, :], kept, query_total, total, EXACT, DECAY)
    place = scores + chunk * (BQ * C) + token[:, None] * C + row[None, :]
    tl.store(place, tl.where(kept, score, 0.0).to(scores.dtype.element_ty))

    factor = factors + chunk * (ROWS * C)
    tl.store(factor + READ * C + row, entered)
    tl.store(factor + WRITE * C + row, left)
    tl.store(factor + RATE * C + row, rate)
    tl.store(factor + VALUE * C + row, 1 / key_factor)
    tl.store(factor + READ_SCALE * C + row, key_scale)
    query_entered = tl.exp(query_total) if DECAY else tl.full([BQ], 1.0, tl.float32)
    tl.store(factor + ASK * C + token, tl.where(query_segment == 0, query_entered, 0.0), mask=token < C)
    tl.store(factor + QUERY * C + token, query_factor, mask=token < C)
    tl.store(factor + QUERY_SCALE * C + token, query_scale, mask=token < C)
    tl.store(carried + chunk, through)


@triton.jit
def to_tokens(vector, token, row_token, MICRO: tl.constexpr):
    """The sums over the rows of each token."""
    if MICRO == 1:
        return vector
    return tl.sum(tl.where(token[:, None] == row_token[None, :], vector[None, :], 0.0), 1)


@triton.jit
def gradients(
    asking,
    reading,
    log_decay,
    reset,
    scores,
    factors,
    entering,
    leaving,
    fresh,
    residual,
    units,
    grad_outputs,
    grad_queries,
    grad_keys,
    grad_beta,
    grad_decay,
    tokens,
    heads,
    chunks,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    MICRO: tl.constexpr,
    BQ: tl.constexpr,
    BETA: tl.constexpr,
    DECAY: tl.constexpr,
    RESET: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of all inputs but values from what the walks left behind. Grid: (chunks, batch × heads)."""
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    dtype = reading.dtype.element_ty
    n = tl.program_id(0)
    pair = tl.program_id(1)
    chunk = pair.to(tl.int64) * chunks + n
    first, start, origin, row_in, token_in = places(n, pair, tokens, heads, C, MICRO, BQ)
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    key_in = (key < K)[None, :]
    row_token = row // MICRO

    begins = row_in & (row % MICRO == 0)
    flags = reset + first
    decay, segment = token_decays(log_decay + origin, flags, row_token, row_token * heads, begins, DECAY, RESET)
    total, entered, left, through = row_decays(decay, segment, row_token, C, EXACT, DECAY)
    if MICRO == 1:
        query_decay = decay
        query_segment = segment
        query_total = total
    else:
        query_decay, query_segment = token_decays(
            log_decay + origin, flags, token, token * heads, token_in, DECAY, RESET
        )
        query_total = tl.cumsum(query_decay, 0)
    query_entered = tl.exp(query_total) if DECAY else tl.full([BQ], 1.0, tl.float32)
    query_entered = tl.where(query_segment == 0, query_entered, 0.0)
    factor = factors + chunk * (ROWS * C)
    rate = tl.load(factor + RATE * C + row)
    # What r is written with, as the keys are multiplied.
    put = rate * tl.load(factor + VALUE * C + row)
    query_factor = tl.load(factor + QUERY * C + token, mask=token < C, other=0.0)
    key_offset = offsets(start, row, key, heads, K)
    query_offset = offsets(origin, token, key, heads, K)

    # First what reads: the queries, of the entering state and of the scores. Each part loads anew what it needs of
    # queries and keys: registers are short.
    to_query = tl.zeros([BQ, BK], tl.float32)
    to_score = tl.zeros([BQ, C], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        output_offset = offsets(origin, token, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        grad_output = tl.load(grad_outputs + output_offset, mask=token_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        excess = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        asked, unit = narrowed(query_factor[:, None] * grad_output.to(tl.float32), dtype)
        state_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, ENTERING))
        excess_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, FRESH))
        to_query += tl.dot(asked, tl.trans(state), input_precision=PRECISION) * state_unit
        to_score += tl.dot(asked, tl.trans(excess), input_precision=PRECISION) * excess_unit
    k = tl.load(reading + key_offset, mask=row_in[:, None] & key_in, other=0.0)
    q = tl.load(asking + query_offset, mask=token_in[:, None] & key_in, other=0.0)
    to_query *= query_entered[:, None]
    kept = (token[:, None] >= row_token[None, :]) & (query_segment[:, None] == segment[None, :])
    to_score = tl.where(kept, to_score * put[None, :], 0.0)
    if DECAY:
        of_query = tl.sum(to_query * q.to(tl.float32), 1)
        score = tl.load(scores + chunk * (BQ * C) + token[:, None] * C + row[None, :]).to(tl.float32)
        weight = tl.where(token[:, None] > row_token[None, :], score * to_score, 0.0)
        of_query += tl.sum(weight, 1)
        of_column = tl.sum(weight, 0)
    to_score *= pair_decays(query_decay, token[:, None], row_token[None, :], kept, query_total, total, EXACT, DECAY)
    of_score, score_unit = narrowed(to_score, dtype)
    to_query += tl.dot(of_score, k, input_precision=PRECISION) * score_unit
    if NORMALIZE:
        wide_query = q.to(tl.float32)
        to_query -= wide_query * (tl.sum(to_query * wide_query, 1) * query_factor * query_factor)[:, None]
    to_query *= tl.load(factor + QUERY_SCALE * C + token, mask=token < C, other=0.0)[:, None]
    tl.store(grad_queries + query_offset, to_query.to(grad_queries.dtype.element_ty), mask=token_in[:, None] & key_in)

    # Then the keys: as they read the entering state and what was written before them.
    to_key = tl.zeros([C, BK], tl.float32)
    to_lower = tl.zeros([C, C], tl.float32)
    to_rate = tl.zeros([C], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        inside = row_in[:, None] & value_in
        value_offset = offsets(start, row, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        excess = tl.load(fresh + value_offset, mask=inside, other=0.0)
        target = tl.load(residual + value_offset, mask=inside, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        unit = tl.load(unit_of(units, chunk, BLOCKS, block, RESIDUAL))
        state_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, ENTERING))
        excess_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, FRESH))
        to_key += tl.dot(target, tl.trans(state), input_precision=PRECISION) * state_unit
        to_lower += tl.dot(target, tl.trans(excess), input_precision=PRECISION) * excess_unit
        if BETA:
            to_rate += tl.sum(target.to(tl.float32) * excess.to(tl.float32), 1) * excess_unit
    key_factor = 1 / tl.load(factor + VALUE * C + row)
    if BETA:
        tl.store(grad_beta + start + row * heads, to_rate * key_factor, mask=row_in)
    to_key *= -(rate * entered)[:, None]
    kept = (row[:, None] > row[None, :]) & (segment[:, None] == segment[None, :])
    to_lower *= -rate[:, None] * put[None, :]
    to_lower *= pair_decays(decay, row_token[:, None], row_token[None, :], kept, total, total, EXACT, DECAY)
    to_lower = tl.where(kept, to_lower, 0.0)
    if DECAY:
        k = tl.load(reading + key_offset, mask=row_in[:, None] & key_in, other=0.0)
        weight = to_lower * tl.dot(k, tl.trans(k), input_precision=PRECISION)
        weight = tl.where(row_token[:, None] > row_token[None, :], weight, 0.0)
        of_column += tl.sum(weight, 0)
        of_state = tl.sum(to_key * k.to(tl.float32), 1)
        of_read = of_state + tl.sum(weight, 1)
    of_lower, lower_unit = narrowed(to_lower, dtype)

    # And as they write to the leaving state.
    left_factor = (put * left)[:, None]
    kept_state = 0.0
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        state_in = (key < K)[:, None] & value_in
        value_offset = offsets(start, row, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        excess = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        grad_state = tl.load(leaving + state_offset, mask=state_in, other=0.0)
        unit = tl.load(unit_of(units, chunk, BLOCKS, block, LEAVING))
        excess_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, FRESH))
        written = tl.dot(excess, tl.trans(grad_state), input_precision=PRECISION)
        to_key += written * (left_factor * excess_unit)
        if DECAY:
            state_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, ENTERING))
            state = tl.load(entering + state_offset, mask=state_in, other=0.0).to(tl.float32)
            kept_state += tl.sum(tl.sum(state * grad_state.to(tl.float32), 1), 0) * state_unit
    k = tl.load(reading + key_offset, mask=row_in[:, None] & key_in, other=0.0)
    if DECAY:
        of_write = tl.sum(to_key * k.to(tl.float32), 1) - of_state
        # A log-decay weighs what the rows from its own on read, less what of theirs is read, and what of the rows
        # before it leaves. Pairs of one token, and rows that leave after it, are left out, not cancelled.
        change = to_tokens(of_read - of_column, token, row_token, MICRO) + of_query
        before = tl.sum(tl.where(row_token[:, None] < token[None, :], of_write[:, None], 0.0), 0)
        to_decay = tl.cumsum(change, 0, reverse=True) + before + through * kept_state
        if RESET:
            begin = tl.load(flags + token, mask=token_in, other=0)
            to_decay = tl.where(begin != 0, 0.0, to_decay)
        tl.store(grad_decay + origin + token * heads, to_decay, mask=token_in)
    q = tl.load(asking + query_offset, mask=token_in[:, None] & key_in, other=0.0)
    to_key += tl.dot(tl.trans(of_score), q, input_precision=PRECISION) * score_unit
    of_keys = tl.dot(of_lower, k, input_precision=PRECISION)
    to_key += tl.dot(tl.trans(of_lower), k, of_keys, input_precision=PRECISION) * lower_unit
    if NORMALIZE:
        wide_key = k.to(tl.float32)
        to_key -= wide_key * (tl.sum(to_key * wide_key, 1) * key_factor * key_factor)[:, None]
    to_key *= tl.load(factor + READ_SCALE * C + row)[:, None]
    tl.store(grad_keys + key_offset, to_key.to(grad_keys.dtype.element_ty), mask=row_in[:, None] & key_in)
