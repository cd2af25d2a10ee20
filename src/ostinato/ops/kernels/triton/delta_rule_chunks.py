"""What `delta_rule` does inside its chunks, all chunks at once, where the decay is one number per head or none.

Before the walk (`delta_rule_walk`): with D_ij = exp(G_i − G_j), G the log-decays summed up from the chunk's start, and
keys and queries of unit length where that is asked,

    A_ij = D_ij k_i·k_j for j < i,    Y = A (I + βA)⁻¹,    P_tj = D_tj q_t·k_j for token(j) ≤ t.

After the walk back, with the walk's S, dS', r and e: y = P u + … and r = v − A u − …, u = β r, so that

    dP = dy uᵀ,    dA = −β e uᵀ,    dv = β e,    dβ = Σ e r,

and the gradients of keys, queries and decays are those of the formulas above. The gradient of G_i is what row i of A
and P weighs, less what column i weighs; that of a log-decay sums over the rows from its own on.

The inverse is by substitution in blocks of 16 rows, and by X ← X − X M X from there, M what lies below the blocks:
never a power series, which loses everything where keys are nearly parallel.

Source: Parallel DeltaNet (arXiv 2406.06484), section 3 and appendix; Gated DeltaNet (arXiv 2412.06464), section 3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import FORGETS, last_of

# The factors of a chunk's rows and tokens, in this order: a, b, β and c of the walks, then what the gradients need
# beside: G and the segment of each row, what makes its key one of unit length, and the same of the tokens' queries.
READ, WRITE, RATE, ASK, TOTAL, SEGMENT, KEY, QUERY_TOTAL, QUERY_SEGMENT, QUERY = (tl.constexpr(i) for i in range(10))
ROWS = tl.constexpr(10)

EPS = tl.constexpr(1e-6)
"""Under the root of a key's length, as in the formula of the plain routes."""


@triton.jit
def unit_lower_inverse(lower, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + L)⁻¹ of a strictly lower triangular L, (C, C)."""
    BLOCKS: tl.constexpr = C // 16
    block = tl.arange(0, BLOCKS)
    small = tl.arange(0, 16)
    same = block[:, None, None, None] == block[None, None, :, None]
    parts = tl.reshape(lower, (BLOCKS, 16, BLOCKS, 16))
    columns = tl.trans(tl.sum(tl.where(same, parts, 0.0), axis=2), (0, 2, 1))
    solved = (small[None, :, None] == small[None, None, :]).to(tl.float32) + tl.zeros([BLOCKS, 16, 16], tl.float32)
    for i in range(1, 16):
        weight = tl.sum(tl.where(small[None, None, :] == i, columns, 0.0), axis=2)
        known = tl.sum(weight[:, :, None] * solved, axis=1)
        solved = tl.where(small[None, :, None] == i, solved - known[:, None, :], solved)
    inverse = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), (C, C))
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    for level in tl.static_range(5):
        if 16 * 2**level < C:
            below = (row // (16 * 2**level) != column // (16 * 2**level)) & (
                row // (32 * 2**level) == column // (32 * 2**level)
            )
            right = tl.dot(tl.where(below, lower, 0.0), inverse, input_precision=PRECISION)
            inverse -= tl.dot(inverse, right, input_precision=PRECISION)
    return inverse


@triton.jit
def unit_lower_quotient(lower, rate, C: tl.constexpr, PRECISION: tl.constexpr):
    """L (I + βL)⁻¹, which is (I − (I + βL)⁻¹) / β, of a strictly lower triangular L, (C, C).

    Its rows are proportional to those of βL, so that a β of 0 can be a very small one.
    """
    safe = tl.where(tl.abs(rate) > 1e-20, rate, 1e-20)[:, None]
    below = tl.arange(0, C)[:, None] > tl.arange(0, C)[None, :]
    return tl.where(below, unit_lower_inverse(safe * lower, C, PRECISION) / -safe, 0.0)


@triton.jit
def load_decays(log_decay, position, stride, taken):
    """Log-decays at `position` of a chunk, bounded; 0 where not `taken`."""
    return tl.maximum(tl.load(log_decay + position * stride, mask=taken, other=0.0).to(tl.float32), FORGETS)


@triton.jit
def token_decays(log_decay, reset, position, stride, taken, DECAY: tl.constexpr, RESET: tl.constexpr):
    """Log-decays and the numbers of segments at `position` of a chunk; (0, 0) where not `taken`."""
    segment = tl.zeros(position.shape, tl.int32)
    decay = tl.zeros(position.shape, tl.float32)
    if DECAY:
        decay = load_decays(log_decay, position, stride, taken)
    if RESET:
        begins = tl.load(reset + position, mask=taken, other=0).to(tl.int32)
        decay = tl.where(begins > 0, 0.0, decay)
        segment = tl.cumsum(begins, 0)
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
    """Y, P, the row factors a, b, β, c and d of every chunk. Grid: (chunks, batch × heads)."""
    TOKENS: tl.constexpr = C // MICRO
    n = tl.program_id(0)
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = pair % heads
    chunk = pair.to(tl.int64) * chunks + n
    steps = tokens * MICRO
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    row_token = row // MICRO
    row_in = (row < TOKENS * MICRO) & (n * (TOKENS * MICRO) + row < steps)
    token_in = (token < TOKENS) & (n * TOKENS + token < tokens)
    start = ((batch * steps + n * (TOKENS * MICRO)) * heads + head).to(tl.int64)
    origin = ((batch * tokens + n * TOKENS) * heads + head).to(tl.int64)

    begins = row_in & (row % MICRO == 0)
    flags = reset + batch * tokens + n * TOKENS
    decay, segment = token_decays(log_decay + origin, flags, row_token, heads, begins, DECAY, RESET)
    total, entered, left, through = row_decays(decay, segment, row_token, C, EXACT, DECAY)
    if MICRO == 1:
        query_decay = decay
        query_segment = segment
        query_total = total
    else:
        query_decay, query_segment = token_decays(log_decay + origin, flags, token, heads, token_in, DECAY, RESET)
        query_total = tl.cumsum(query_decay, 0)

    # First the keys. Their squared lengths are on the diagonal of their scores.
    key_offset = start * K + row[:, None] * (heads * K) + key[None, :]
    key_mask = row_in[:, None] & (key < K)[None, :]
    k = tl.load(keys + key_offset, mask=key_mask, other=0.0)
    lower = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    key_scale = tl.full([C], 1.0, tl.float32)
    if NORMALIZE:
        squares = tl.where(row[:, None] == row[None, :], lower, 0.0)
        key_scale = tl.rsqrt(tl.sum(squares, 0) + EPS)
        lower *= tl.rsqrt(tl.sum(squares, 1) + EPS)[:, None] * key_scale[None, :]
    kept = (row[:, None] > row[None, :]) & (segment[:, None] == segment[None, :])
    lower *= pair_decays(decay, row_token[:, None], row_token[None, :], kept, total, total, EXACT, DECAY)
    lower = tl.where(kept, lower, 0.0)
    if BETA:
        rate = tl.load(beta + start + row * heads, mask=row_in, other=0.0).to(tl.float32)
    else:
        rate = row_in.to(tl.float32)
    factor = factors + chunk * (ROWS * C)
    tl.store(factor + READ * C + row, entered * key_scale)
    tl.store(factor + WRITE * C + row, left * key_scale)
    tl.store(factor + RATE * C + row, rate)
    tl.store(factor + TOTAL * C + row, total)
    tl.store(factor + SEGMENT * C + row, segment.to(tl.float32))
    tl.store(factor + KEY * C + row, key_scale)
    tl.store(carried + chunk, through)
    solved = unit_lower_quotient(lower, rate, C, SOLVE)
    place = inverse + chunk * (C * C) + row[:, None] * C + row[None, :]
    tl.store(place, solved.to(inverse.dtype.element_ty))

    # Then the queries.
    query_offset = origin * K + token[:, None] * (heads * K) + key[None, :]
    q = tl.load(queries + query_offset, mask=token_in[:, None] & (key < K)[None, :], other=0.0)
    k = tl.load(keys + key_offset, mask=key_mask, other=0.0)
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * key_scale[None, :]
    query_scale = tl.full([BQ], 1.0, tl.float32)
    if NORMALIZE:
        squares = tl.dot(q, tl.trans(q), input_precision=PRECISION)
        squares = tl.where(token[:, None] == token[None, :], squares, 0.0)
        query_scale = tl.rsqrt(tl.sum(squares, 1) + EPS)
        score *= query_scale[:, None]
    kept = (token[:, None] >= row_token[None, :]) & (query_segment[:, None] == segment[None, :])
    score *= pair_decays(query_decay, token[:, None], row_token[None, :], kept, query_total, total, EXACT, DECAY)
    place = scores + chunk * (BQ * C) + token[:, None] * C + row[None, :]
    tl.store(place, tl.where(kept, score, 0.0).to(scores.dtype.element_ty))
    query_entered = tl.exp(query_total) if DECAY else tl.full([BQ], 1.0, tl.float32)
    query_entered = tl.where(query_segment == 0, query_entered, 0.0)
    token_in = token < C
    tl.store(factor + ASK * C + token, query_entered * query_scale, mask=token_in)
    tl.store(factor + QUERY_TOTAL * C + token, query_total, mask=token_in)
    tl.store(factor + QUERY_SEGMENT * C + token, query_segment.to(tl.float32), mask=token_in)
    tl.store(factor + QUERY * C + token, query_scale, mask=token_in)


@triton.jit
def gradients(
    queries,
    keys,
    log_decay,
    factors,
    scores,
    entering,
    leaving,
    fresh,
    residual,
    grad_outputs,
    grad_queries,
    grad_keys,
    grad_values,
    grad_beta,
    weights,
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
    """The gradients of queries, keys, values and β from what the walks left behind. Grid: (chunks, batch × heads).

    For the log-decays' gradients it leaves `weights`: (…, chunks, 5, C), see `decay_gradients`.
    """
    TOKENS: tl.constexpr = C // MICRO
    dtype = keys.dtype.element_ty
    n = tl.program_id(0)
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    head = pair % heads
    chunk = pair.to(tl.int64) * chunks + n
    steps = tokens * MICRO
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    key = tl.arange(0, BK)
    key_in = (key < K)[None, :]
    row_token = row // MICRO
    row_in = (row < TOKENS * MICRO) & (n * (TOKENS * MICRO) + row < steps)
    token_in = (token < TOKENS) & (n * TOKENS + token < tokens)
    start = ((batch * steps + n * (TOKENS * MICRO)) * heads + head).to(tl.int64)
    origin = ((batch * tokens + n * TOKENS) * heads + head).to(tl.int64)
    key_offset = start * K + row[:, None] * (heads * K) + key[None, :]
    query_offset = origin * K + token[:, None] * (heads * K) + key[None, :]
    factor = factors + chunk * (ROWS * C) + row
    query_factor = factors + chunk * (ROWS * C) + token
    weight_place = weights + chunk * (5 * C)

    # First what reads: the queries, of the entering state and of the scores. Each part loads anew what it needs of
    # queries, keys and factors: registers are short, and short vectors are loaded faster than they change hands.
    to_query = tl.zeros([BQ, BK], tl.float32)
    to_score = tl.zeros([BQ, C], tl.float32)
    for block in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = start * V + row[:, None] * (heads * V) + value[None, :]
        output_offset = origin * V + token[:, None] * (heads * V) + value[None, :]
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        grad_output = tl.load(grad_outputs + output_offset, mask=token_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        excess = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        to_query = tl.dot(grad_output, tl.trans(state), to_query, input_precision=PRECISION)
        to_score = tl.dot(grad_output, tl.trans(excess), to_score, input_precision=PRECISION)
    k = tl.load(keys + key_offset, mask=row_in[:, None] & key_in, other=0.0)
    q = tl.load(queries + query_offset, mask=token_in[:, None] & key_in, other=0.0).to(tl.float32)
    to_query *= tl.load(query_factor + ASK * C)[:, None]
    kept = token[:, None] >= row_token[None, :]
    if RESET:
        kept = kept & (tl.load(query_factor + QUERY_SEGMENT * C)[:, None] == tl.load(factor + SEGMENT * C)[None, :])
    to_score = tl.where(kept, to_score * tl.load(factor + RATE * C)[None, :], 0.0)
    if DECAY:
        score = tl.load(scores + chunk * (BQ * C) + token[:, None] * C + row[None, :]).to(tl.float32)
        weight = tl.where(token[:, None] > row_token[None, :], score * to_score, 0.0)
        tl.store(weight_place + token, tl.sum(to_query * q, 1) + tl.sum(weight, 1), mask=token < C)
        tl.store(weight_place + C + row, tl.sum(weight, 0))
    query_scale = tl.load(query_factor + QUERY * C)
    to_score *= query_scale[:, None] * tl.load(factor + KEY * C)[None, :]
    if DECAY:
        decay = tl.zeros([BQ], tl.float32)
        if EXACT:
            decay = load_decays(log_decay + origin, token, heads, token_in)
        total = tl.load(factor + TOTAL * C)
        query_total = tl.load(query_factor + QUERY_TOTAL * C)
        to_score *= pair_decays(decay, token[:, None], row_token[None, :], kept, query_total, total, EXACT, DECAY)
    of_score = to_score.to(dtype)
    to_query = tl.dot(of_score, k, to_query, input_precision=PRECISION)
    if NORMALIZE:
        to_query -= q * (tl.sum(to_query * q, 1) * query_scale * query_scale)[:, None]
    tl.store(grad_queries + query_offset, to_query.to(dtype), mask=token_in[:, None] & key_in)

    # Then the keys: as they read the entering state and what was written before them.
    to_key = tl.zeros([C, BK], tl.float32)
    to_lower = tl.zeros([C, C], tl.float32)
    to_rate = tl.zeros([C], tl.float32)
    rate = tl.load(factor + RATE * C)[:, None]
    for block in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        inside = row_in[:, None] & value_in
        value_offset = start * V + row[:, None] * (heads * V) + value[None, :]
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        excess = tl.load(fresh + value_offset, mask=inside, other=0.0)
        target = tl.load(residual + value_offset, mask=inside, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        to_key = tl.dot(target, tl.trans(state), to_key, input_precision=PRECISION)
        to_lower = tl.dot(target, tl.trans(excess), to_lower, input_precision=PRECISION)
        wide = target.to(tl.float32)
        if BETA:
            to_rate += tl.sum(wide * excess.to(tl.float32), 1)
        tl.store(grad_values + value_offset, (rate * wide).to(dtype), mask=inside)
    if BETA:
        tl.store(grad_beta + start + row * heads, to_rate, mask=row_in)
    rate = tl.load(factor + RATE * C)
    to_key *= -(rate * tl.load(factor + READ * C))[:, None]
    kept = row[:, None] > row[None, :]
    if RESET:
        segment = tl.load(factor + SEGMENT * C)
        kept = kept & (segment[:, None] == segment[None, :])
    rate *= tl.load(factor + KEY * C)
    to_lower *= -rate[:, None] * rate[None, :]
    if DECAY:
        decay = tl.zeros([C], tl.float32)
        if EXACT:
            decay = load_decays(log_decay + origin, row_token, heads, row_in & (row % MICRO == 0))
        total = tl.load(factor + TOTAL * C)
        to_lower *= pair_decays(decay, row_token[:, None], row_token[None, :], kept, total, total, EXACT, DECAY)
    to_lower = tl.where(kept, to_lower, 0.0)
    if DECAY:
        k = tl.load(keys + key_offset, mask=row_in[:, None] & key_in, other=0.0)
        weight = to_lower * tl.dot(k, tl.trans(k), input_precision=PRECISION)
        weight = tl.where(row_token[:, None] > row_token[None, :], weight, 0.0)
        tl.store(weight_place + 2 * C + row, tl.sum(weight, 0))
        of_state = tl.sum(to_key * k.to(tl.float32), 1)
        tl.store(weight_place + 3 * C + row, of_state + tl.sum(weight, 1))
    of_lower = to_lower.to(dtype)

    # And as they write to the leaving state.
    rate = (tl.load(factor + RATE * C) * tl.load(factor + WRITE * C))[:, None]
    kept_state = tl.zeros([BK], tl.float32)
    for block in tl.range(0, (V + BV - 1) // BV, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        state_in = (key < K)[:, None] & value_in
        value_offset = start * V + row[:, None] * (heads * V) + value[None, :]
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        excess = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0).to(tl.float32)
        grad_state = tl.load(leaving + state_offset, mask=state_in, other=0.0)
        to_key = tl.dot((rate * excess).to(dtype), tl.trans(grad_state), to_key, input_precision=PRECISION)
        if DECAY:
            state = tl.load(entering + state_offset, mask=state_in, other=0.0).to(tl.float32)
            kept_state += tl.sum(state * grad_state.to(tl.float32), 1)
    k = tl.load(keys + key_offset, mask=row_in[:, None] & key_in, other=0.0)
    if DECAY:
        of_write = tl.sum(to_key * k.to(tl.float32), 1) - of_state
        tl.store(weight_place + 4 * C + row, of_write)
        tl.store(weights + tl.num_programs(1).to(tl.int64) * chunks * (5 * C) + chunk, tl.sum(kept_state, 0))
    q = tl.load(queries + query_offset, mask=token_in[:, None] & key_in, other=0.0)
    to_key = tl.dot(tl.trans(of_score), q, to_key, input_precision=PRECISION)
    to_key = tl.dot(of_lower, k, to_key, input_precision=PRECISION)
    to_key = tl.dot(tl.trans(of_lower), k, to_key, input_precision=PRECISION)
    if NORMALIZE:
        wide_key = k.to(tl.float32)
        key_scale = tl.load(factor + KEY * C)
        to_key -= wide_key * (tl.sum(to_key * wide_key, 1) * key_scale * key_scale)[:, None]
    tl.store(grad_keys + key_offset, to_key.to(dtype), mask=row_in[:, None] & key_in)


@triton.jit
def decay_gradients(
    weights,
    carried,
    reset,
    grad_decay,
    tokens,
    heads,
    chunks,
    C: tl.constexpr,
    MICRO: tl.constexpr,
    BQ: tl.constexpr,
    RESET: tl.constexpr,
):
    """The gradients of the log-decays, from `weights`. Grid: (chunks, batch × heads).

    Those are, of each chunk, what its queries read; what of its rows queries and later keys read; what its keys
    read; what its rows leave; and after those of all chunks ⟨S, dS'⟩, one number each.

    A log-decay weighs what the rows from its own on read, less what of theirs is read, and what of the rows before it
    leaves. Pairs of one token, and rows that leave after it, are left out, not cancelled.
    """
    TOKENS: tl.constexpr = C // MICRO
    n = tl.program_id(0)
    pair = tl.program_id(1)
    batch = (pair // heads).to(tl.int64)
    chunk = pair.to(tl.int64) * chunks + n
    row = tl.arange(0, C)
    token = tl.arange(0, BQ)
    row_token = row // MICRO
    token_in = (token < TOKENS) & (n * TOKENS + token < tokens)
    place = weights + chunk * (5 * C)
    change = tl.load(place + 3 * C + row) - tl.load(place + C + row) - tl.load(place + 2 * C + row)
    after = row_token[:, None] >= token[None, :]
    found = tl.sum(tl.where(after, change[:, None], tl.load(place + 4 * C + row)[:, None]), 0)
    asked = tl.load(place + token, mask=token < TOKENS, other=0.0)
    found += tl.cumsum(asked, 0, reverse=True)
    kept_state = tl.load(weights + tl.num_programs(1).to(tl.int64) * chunks * (5 * C) + chunk)
    found += tl.load(carried + chunk) * kept_state
    if RESET:
        begin = tl.load(reset + batch * tokens + n * TOKENS + token, mask=token_in, other=0)
        found = tl.where(begin != 0, 0.0, found)
    origin = ((batch * tokens + n * TOKENS) * heads + pair % heads).to(tl.int64)
    tl.store(grad_decay + origin + token * heads, found, mask=token_in)
