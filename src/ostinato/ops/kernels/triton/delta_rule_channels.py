"""What `delta_rule` does inside its chunks, all chunks at once, where every key channel has a decay of its own.

The mathematics is that of `delta_rule_chunks`, with decays that do not leave the sums over channels:

    A_ij = Σ_c k_ic k_jc exp(G_ic − G_jc),    P_tj = Σ_c q_tc k_jc exp(G_tc − G_jc).

The pairs of tokens are taken by levels s = 1, 2, 4, …: in every block of 2s tokens the late half against the early.
With R the G of the last early token, exp(G_i − G_j) = exp(G_i − R) exp(R − G_j), both ≤ 1, so that a level is a
product of matrices, masked to its blocks. The walks are handed keys and queries that carry their decays already.

Rows may write with other keys w than they read with (TIED is False): A_ij = Σ_c k_ic w_jc …, P_tj = Σ_c q_tc w_jc ….
In a level the late half reads and the early half writes, so that one tile still holds all that it needs.

G is summed up in float32, in float64 where the inputs are float32: differences of sums then keep all digits of a
weak decay after a strong one.

Source: GLA (arXiv 2312.06635), section 4.3; Kimi Linear (arXiv 2510.26692), section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS, last_of
from ostinato.ops.kernels.triton.delta_rule_parts import (
    ASK,
    RATE,
    READ,
    ROWS,
    WRITE,
    lengths,
    load_rates,
    offsets,
    places,
    segments,
    unit_lower_inverse,
)


@triton.jit
def cumulate(
    log_decay,
    reset,
    totals,
    carried,
    tokens,
    heads,
    chunks,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    MICRO: tl.constexpr,
    BQ: tl.constexpr,
    RESET: tl.constexpr,
):
    """G of every token, (…, chunks, BQ, K), and the states' factors. Grid: (key blocks, chunks, batch × heads)."""
    n = tl.program_id(1)
    pair = tl.program_id(2)
    chunk = pair.to(tl.int64) * chunks + n
    first, _, origin, _, token_in = places(n, pair, tokens, heads, C, MICRO, BQ)
    token = tl.arange(0, BQ)
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = offsets(origin, token, key, heads, K)
    decay = tl.load(log_decay + place, mask=token_in[:, None] & (key < K)[None, :], other=0.0).to(tl.float32)
    decay = tl.maximum(decay, FORGETS)
    keeps = 1.0
    if RESET:
        begins = tl.load(reset + first + token, mask=token_in, other=0).to(tl.int32)
        decay = tl.where((begins > 0)[:, None], 0.0, decay)
        keeps = tl.where(tl.sum(begins, 0) == 0, 1.0, 0.0)
    total = tl.cumsum(decay.to(totals.dtype.element_ty), 0)
    place = totals + chunk * (BQ * K) + token[:, None] * K + key[None, :]
    tl.store(place, total, mask=(key < K)[None, :] & (token >= 0)[:, None])
    whole = tl.sum(tl.where(token[:, None] == BQ - 1, total, 0.0), 0).to(tl.float32)
    tl.store(carried + chunk * K + key, tl.exp(whole) * keeps, mask=key < K)


@triton.jit
def load_totals(totals, token, key, SIZE: tl.constexpr, K: tl.constexpr):
    """G of the tokens of one chunk, zeros beyond `SIZE` tokens."""
    inside = (token < SIZE)[:, None] & (key < K)[None, :]
    return tl.load(totals + token[:, None] * K + key[None, :], mask=inside, other=0.0)


@triton.jit
def load_scaled(place, mask, scale):
    """A tile of keys or queries in float32, each row times its scale."""
    return tl.load(place, mask=mask, other=0.0).to(tl.float32) * scale[:, None]


@triton.jit
def level_factor(totals, token, key, size, TOKENS: tl.constexpr, BQ: tl.constexpr, K: tl.constexpr):
    """exp(G − R) in the late half of each block of 2 `size` tokens, exp(R − G) in the early, 0 where R lies outside."""
    middle = token // (2 * size) * (2 * size) + size - 1
    difference = load_totals(totals, token, key, BQ, K) - load_totals(totals, middle, key, TOKENS, K)
    late = (token // size % 2 == 1)[:, None]
    factor = tl.exp(tl.minimum(tl.where(late, difference, -difference).to(tl.float32), 0.0))
    return tl.where((middle < TOKENS)[:, None], factor, 0.0)


@triton.jit
def level_kept(token, column, segment, column_segment, size):
    """The pairs of a level: a late token and an early one of one block and one segment."""
    kept = (token // (2 * size))[:, None] == (column // (2 * size))[None, :]
    kept = kept & (token // size % 2 == 1)[:, None] & (column // size % 2 == 0)[None, :]
    return kept & (segment[:, None] == column_segment[None, :])


@triton.jit
def level_keys(read, write, token, size):
    """The keys of a level: of its late halves those that read, of its early halves those that write."""
    return tl.where((token // size % 2 == 1)[:, None], read, write)


@triton.jit
def prepare(
    queries,
    keys,
    write_keys,
    beta,
    totals,
    reset,
    inverse,
    scores,
    factors,
    asking,
    reading,
    writing,
    tokens,
    heads,
    chunks,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    MICRO: tl.constexpr,
    BQ: tl.constexpr,
    LEVELS: tl.constexpr,
    BETA: tl.constexpr,
    RESET: tl.constexpr,
    TIED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    SOLVE: tl.constexpr,
):
    """Y and P of every chunk, and its queries and keys as the walks want them. Grid: (chunks, batch × heads)."""
    TOKENS: tl.constexpr = C // MICRO
    dtype = keys.dtype.element_ty
    n = tl.program_id(0)
    pair = tl.program_id(1)
    chunk = pair.to(tl.int64) * chunks + n
    first, start, origin, row_in, token_in = places(n, pair, tokens, heads, C, MICRO, BQ)
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    key_in = (key < K)[None, :]
    row_token = row // MICRO
    segment, _ = segments(reset + first, row_token, row_in & (row % MICRO == 0), RESET)
    query_segment, _ = segments(reset + first, token, token_in, RESET)

    key_offset = offsets(start, row, key, heads, K)
    query_offset = offsets(origin, token, key, heads, K)
    k = tl.load(keys + key_offset, mask=row_in[:, None] & key_in, other=0.0).to(tl.float32)
    q = tl.load(queries + query_offset, mask=token_in[:, None] & key_in, other=0.0).to(tl.float32)
    k *= lengths(k, C, NORMALIZE)[:, None]
    q *= lengths(q, BQ, NORMALIZE)[:, None]
    w = k if TIED else tl.load(write_keys + key_offset, mask=row_in[:, None] & key_in, other=0.0).to(tl.float32)
    rate = load_rates(beta, start, row, row_in, heads, BETA)

    totals += chunk * (BQ * K)
    total = load_totals(totals, row_token, key, BQ, K)
    query_total = load_totals(totals, token, key, BQ, K)
    own = row_token[:, None] == row_token[None, :]
    narrow = w.to(dtype)
    lower = tl.where(own, tl.dot(k.to(dtype), tl.trans(narrow), input_precision=PRECISION), 0.0)
    own = token[:, None] == row_token[None, :]
    score = tl.where(own, tl.dot(q.to(dtype), tl.trans(narrow), input_precision=PRECISION), 0.0)
    for level in tl.range(0, LEVELS, num_stages=1):
        size = 1 << level
        level_k = k if TIED else level_keys(k, w, row_token, size)
        decayed = (level_k * level_factor(totals, row_token, key, size, TOKENS, BQ, K)).to(dtype)
        kept = level_kept(row_token, row_token, segment, segment, size)
        lower += tl.where(kept, tl.dot(decayed, tl.trans(decayed), input_precision=PRECISION), 0.0)
        asked = (q * level_factor(totals, token, key, size, TOKENS, BQ, K)).to(dtype)
        kept = level_kept(token, row_token, query_segment, segment, size)
        score += tl.where(kept, tl.dot(asked, tl.trans(decayed), input_precision=PRECISION), 0.0)
    lower = tl.where(row[:, None] > row[None, :], lower, 0.0)
    solved = tl.dot(lower, unit_lower_inverse(rate[:, None] * lower, C, SOLVE), input_precision=SOLVE)
    place = inverse + chunk * (C * C) + row[:, None] * C + row[None, :]
    tl.store(place, solved.to(inverse.dtype.element_ty))
    place = scores + chunk * (BQ * C) + token[:, None] * C + row[None, :]
    tl.store(place, score.to(scores.dtype.element_ty))

    last = load_totals(totals, tl.full([C], BQ - 1, tl.int32), key, BQ, K)
    left = tl.where((segment == last_of(segment, C))[:, None], tl.exp((last - total).to(tl.float32)), 0.0)
    entered = tl.where((segment == 0)[:, None], tl.exp(total.to(tl.float32)), 0.0)
    tl.store(writing + key_offset, (w * left).to(dtype), mask=row_in[:, None] & key_in)
    tl.store(reading + key_offset, (k * entered).to(dtype), mask=row_in[:, None] & key_in)
    entered = tl.where((query_segment == 0)[:, None], tl.exp(query_total.to(tl.float32)), 0.0)
    tl.store(asking + query_offset, (q * entered).to(dtype), mask=token_in[:, None] & key_in)
    factor = factors + chunk * (ROWS * C) + row
    one = tl.full([C], 1.0, tl.float32)
    tl.store(factor + READ * C, one)
    tl.store(factor + WRITE * C, one)
    tl.store(factor + RATE * C, rate)
    tl.store(factor + ASK * C, one)


@triton.jit
def gradients(
    queries,
    keys,
    write_keys,
    beta,
    totals,
    carried,
    reset,
    entering,
    leaving,
    fresh,
    residual,
    grad_outputs,
    grad_queries,
    grad_keys,
    grad_write_keys,
    grad_values,
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
    LEVELS: tl.constexpr,
    BETA: tl.constexpr,
    RESET: tl.constexpr,
    TIED: tl.constexpr,
    NORMALIZE: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradients of all inputs from what the walks left behind. Grid: (chunks, batch × heads)."""
    TOKENS: tl.constexpr = C // MICRO
    dtype = keys.dtype.element_ty
    n = tl.program_id(0)
    pair = tl.program_id(1)
    chunk = pair.to(tl.int64) * chunks + n
    first, start, origin, row_in, token_in = places(n, pair, tokens, heads, C, MICRO, BQ)
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    key_in = (key < K)[None, :]
    row_token = row // MICRO

    segment, _ = segments(reset + first, row_token, row_in & (row % MICRO == 0), RESET)
    query_segment, _ = segments(reset + first, token, token_in, RESET)
    rate = load_rates(beta, start, row, row_in, heads, BETA)
    key_offset = offsets(start, row, key, heads, K)
    key_mask = row_in[:, None] & key_in
    query_offset = offsets(origin, token, key, heads, K)
    query_mask = token_in[:, None] & key_in
    key_scale = lengths(tl.load(keys + key_offset, mask=key_mask, other=0.0), C, NORMALIZE)
    query_scale = lengths(tl.load(queries + query_offset, mask=query_mask, other=0.0), BQ, NORMALIZE)
    totals += chunk * (BQ * K)
    writers = keys if TIED else write_keys

    # A log-decay weighs what the rows from its own on read, less what of theirs is read, and what of the rows before
    # it leaves. Pairs of one token, and rows that leave after it, are left out of the sums, not cancelled. The sums
    # grow in the gradient's place, and tiles that several levels need are loaded anew (`again` is 0, which
    # the compiler does not see): registers are short.
    reads = (row_token[None, :] >= token[:, None]).to(tl.float32)
    asks = (token[None, :] >= token[:, None]).to(tl.float32)
    own_token = token[:, None] == row_token[None, :]

    # First the queries: of the entering state, of earlier keys level by level, and of the keys of their own token.
    to_query = tl.zeros([BQ, BK], tl.float32)
    to_score = tl.zeros([BQ, C], tl.float32)
    for block in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        output_offset = offsets(origin, token, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        grad_output = tl.load(grad_outputs + output_offset, mask=token_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        written = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        to_query = tl.dot(grad_output, tl.trans(state), to_query, input_precision=PRECISION)
        to_score = tl.dot(grad_output, tl.trans(written), to_score, input_precision=PRECISION)
    of_score = (to_score * rate[None, :]).to(dtype)
    total = load_totals(totals, token, key, BQ, K).to(tl.float32)
    to_query *= tl.where((query_segment == 0)[:, None], tl.exp(total), 0.0)
    for level in tl.range(0, LEVELS, num_stages=1):
        size = 1 << level
        again = (level >> 8) * 128
        w = load_scaled(writers + key_offset + again, key_mask, key_scale)
        decayed = (w * level_factor(totals + again, row_token, key, size, TOKENS, BQ, K)).to(dtype)
        kept = level_kept(token, row_token, query_segment, segment, size)
        part = tl.where(kept, of_score, tl.zeros_like(of_score))
        weighed = tl.dot(part, decayed, input_precision=PRECISION)
        to_query += weighed * level_factor(totals + again, token, key, size, TOKENS, BQ, K)
    q = load_scaled(queries + query_offset, query_mask, query_scale)
    tl.store(grad_decay + query_offset, tl.dot(asks, q * to_query, input_precision=PRECISION), mask=query_mask)
    part = tl.where(own_token, of_score, tl.zeros_like(of_score))
    w = load_scaled(writers + key_offset, key_mask, key_scale)
    to_query = tl.dot(part, w.to(dtype), to_query, input_precision=PRECISION)
    if NORMALIZE:
        q = load_scaled(queries + query_offset, query_mask, query_scale)
        to_query = (to_query - q * tl.sum(to_query * q, 1)[:, None]) * query_scale[:, None]
    tl.store(grad_queries + query_offset, to_query.to(dtype), mask=query_mask)

    # Then the keys, as they read and as they write; first of one another.
    to_lower = tl.zeros([C, C], tl.float32)
    to_rate = tl.zeros([C], tl.float32)
    for block in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        inside = row_in[:, None] & (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        written = tl.load(fresh + value_offset, mask=inside, other=0.0)
        target = tl.load(residual + value_offset, mask=inside, other=0.0)
        to_lower = tl.dot(target, tl.trans(written), to_lower, input_precision=PRECISION)
        wide = target.to(tl.float32)
        if BETA:
            to_rate += tl.sum(wide * written.to(tl.float32), 1)
        tl.store(grad_values + value_offset, (rate[:, None] * wide).to(dtype), mask=inside)
    if BETA:
        tl.store(grad_beta + start + row * heads, to_rate, mask=row_in)
    to_lower = tl.where(row[:, None] > row[None, :], -rate[:, None] * to_lower * rate[None, :], 0.0)
    to_read = tl.zeros([C, BK], tl.float32)
    to_write = tl.zeros([C, BK], tl.float32)
    for level in tl.range(0, LEVELS, num_stages=1):
        size = 1 << level
        again = (level >> 8) * 128
        q = load_scaled(queries + query_offset + again, query_mask, query_scale)
        asked = (q * level_factor(totals + again, token, key, size, TOKENS, BQ, K)).to(dtype)
        kept = level_kept(token, row_token, query_segment, segment, size)
        part = tl.where(kept, of_score, tl.zeros_like(of_score))
        column = tl.dot(tl.trans(part), asked, input_precision=PRECISION)
        factor = level_factor(totals + again, row_token, key, size, TOKENS, BQ, K)
        k = load_scaled(keys + key_offset + again, key_mask, key_scale)
        if not TIED:
            k = level_keys(k, load_scaled(write_keys + key_offset + again, key_mask, key_scale), row_token, size)
        decayed = (k * factor).to(dtype)
        kept = level_kept(row_token, row_token, segment, segment, size)
        pairs = tl.where(kept, to_lower, 0.0)
        pairs = pairs.to(dtype)
        to_read += factor * tl.dot(pairs, decayed, input_precision=PRECISION)
        to_write += factor * tl.dot(tl.trans(pairs), decayed, column, input_precision=PRECISION)

    # What they read of the entering state.
    of_state = tl.zeros([C, BK], tl.float32)
    for block in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        target = tl.load(residual + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        of_state = tl.dot(target, tl.trans(state), of_state, input_precision=PRECISION)
    total = load_totals(totals, row_token, key, BQ, K)
    to_read -= of_state * tl.where((segment == 0)[:, None], rate[:, None] * tl.exp(total.to(tl.float32)), 0.0)
    k = load_scaled(keys + key_offset, key_mask, key_scale)
    if TIED:
        w = k
        weight = k * (to_read - to_write)
    else:
        w = load_scaled(write_keys + key_offset, key_mask, key_scale)
        weight = k * to_read - w * to_write
    change = tl.dot(reads, weight, input_precision=PRECISION)
    if MICRO > 1:
        own = tl.where(row_token[:, None] == row_token[None, :], to_lower, 0.0).to(dtype)
        to_read = tl.dot(own, w.to(dtype), to_read, input_precision=PRECISION)
        to_write = tl.dot(tl.trans(own), k.to(dtype), to_write, input_precision=PRECISION)
    part = tl.where(own_token, of_score, tl.zeros_like(of_score))
    q = load_scaled(queries + query_offset, query_mask, query_scale)
    to_write = tl.dot(tl.trans(part), q.to(dtype), to_write, input_precision=PRECISION)
    if TIED:
        to_key = to_read + to_write
    else:
        to_key = to_write
        tl.store(grad_keys + key_offset, to_read.to(dtype), mask=key_mask)
    tl.debug_barrier()
    change += tl.load(grad_decay + query_offset, mask=query_mask, other=0.0)

    # And what they write into the leaving one.
    of_state = tl.zeros([C, BK], tl.float32)
    kept_state = tl.zeros([BK], tl.float32)
    for block in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        state_in = (key < K)[:, None] & value_in
        written = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=state_in, other=0.0)
        grad_state = tl.load(leaving + state_offset, mask=state_in, other=0.0)
        of_state = tl.dot(written, tl.trans(grad_state), of_state, input_precision=PRECISION)
        kept_state += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1)
    last = load_totals(totals, tl.full([C], BQ - 1, tl.int32), key, BQ, K)
    total = load_totals(totals, row_token, key, BQ, K)
    left = tl.exp((last - total).to(tl.float32))
    of_state *= tl.where((segment == last_of(segment, C))[:, None], rate[:, None] * left, 0.0)
    to_key += of_state
    w = load_scaled(writers + key_offset, key_mask, key_scale)
    change = tl.dot(1.0 - reads, w * of_state, change, input_precision=PRECISION)
    change += (tl.load(carried + chunk * K + key, mask=key < K, other=0.0) * kept_state)[None, :]
    if RESET:
        begin = tl.load(reset + first + token, mask=token_in, other=0)
        change = tl.where((begin != 0)[:, None], 0.0, change)
    tl.debug_barrier()
    tl.store(grad_decay + query_offset, change, mask=query_mask)
    if NORMALIZE:
        k = load_scaled(keys + key_offset, key_mask, key_scale)
        to_key = (to_key - k * tl.sum(to_key * k, 1)[:, None]) * key_scale[:, None]
    tl.store((grad_keys if TIED else grad_write_keys) + key_offset, to_key.to(dtype), mask=key_mask)
