"""What `delta_rule` does inside its chunks, all chunks at once, where every key channel has a decay of its own.

The backward pass stands in `delta_rule_channels_gradients`.

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
    QUERY,
    QUERY_SCALE,
    RATE,
    READ,
    READ_SCALE,
    ROWS,
    VALUE,
    WRITE,
    WRITE_SCALE,
    load_rates,
    offsets,
    places,
    row_scales,
    segments,
    solved_scores,
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
    segment, _ = segments(reset + first, row_token, row_in & (row % MICRO == 0), RESET)
    query_segment, _ = segments(reset + first, token, token_in, RESET)

    key_offset = offsets(start, row, key, heads, K)
    query_offset = offsets(origin, token, key, heads, K)
    k = tl.load(keys + key_offset, mask=row_in[:, None] & key_in, other=0.0).to(tl.float32)
    q = tl.load(queries + query_offset, mask=token_in[:, None] & key_in, other=0.0).to(tl.float32)
    key_scale, key_factor = row_scales(k, dtype, C, NORMALIZE)
    query_scale, query_factor = row_scales(q, dtype, BQ, NORMALIZE)
    k *= key_scale[:, None]
    q *= query_scale[:, None]
    w = k
    write_scale = key_scale
    write_factor = key_factor
    if not TIED:
        w = tl.load(write_keys + key_offset, mask=row_in[:, None] & key_in, other=0.0).to(tl.float32)
        write_scale, write_factor = row_scales(w, dtype, C, NORMALIZE)
        w *= write_scale[:, None]
    rate = load_rates(beta, start, row, row_in, heads, BETA) * key_factor * write_factor

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
    solved = solved_scores(lower, rate, C, SOLVE)
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
    factor = factors + chunk * (ROWS * C)
    one = tl.full([C], 1.0, tl.float32)
    tl.store(factor + READ * C + row, one)
    tl.store(factor + WRITE * C + row, one)
    tl.store(factor + RATE * C + row, rate)
    tl.store(factor + VALUE * C + row, 1 / key_factor)
    tl.store(factor + READ_SCALE * C + row, key_scale)
    tl.store(factor + WRITE_SCALE * C + row, write_scale)
    tl.store(factor + ASK * C + row, one)
    tl.store(factor + QUERY * C + token, query_factor, mask=token < C)
    tl.store(factor + QUERY_SCALE * C + token, query_scale, mask=token < C)
