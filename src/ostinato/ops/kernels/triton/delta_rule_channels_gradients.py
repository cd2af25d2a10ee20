"""The gradients of what `delta_rule_channels` does inside its chunks, all chunks at once.

They are taken by the same levels, with the same factors, all ≤ 1. In the notation of that file.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import last_of
from ostinato.ops.kernels.triton.delta_rule_channels import (
    level_factor,
    level_kept,
    level_keys,
    load_scaled,
    load_totals,
)
from ostinato.ops.kernels.triton.delta_rule_parts import (
    ENTERING,
    FRESH,
    LEAVING,
    QUERY,
    QUERY_SCALE,
    RATE,
    READ_SCALE,
    RESIDUAL,
    ROWS,
    VALUE,
    WRITE_SCALE,
    narrowed,
    offsets,
    places,
    segments,
    unit_of,
)


@triton.jit
def gradients(
    queries,
    keys,
    write_keys,
    totals,
    factors,
    carried,
    reset,
    entering,
    leaving,
    fresh,
    residual,
    units,
    grad_outputs,
    grad_queries,
    grad_keys,
    grad_write_keys,
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
    """The gradients of all inputs but values from what the walks left behind. Grid: (chunks, batch × heads)."""
    TOKENS: tl.constexpr = C // MICRO
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    dtype = entering.dtype.element_ty
    narrow = grad_keys.dtype.element_ty
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
    factor = factors + chunk * (ROWS * C)
    rate = tl.load(factor + RATE * C + row)
    # What r is written with, as the keys are multiplied.
    put = rate * tl.load(factor + VALUE * C + row)
    key_scale = tl.load(factor + READ_SCALE * C + row)
    write_scale = tl.load(factor + WRITE_SCALE * C + row)
    query_scale = tl.load(factor + QUERY_SCALE * C + token, mask=token < C, other=0.0)
    query_factor = tl.load(factor + QUERY * C + token, mask=token < C, other=0.0)
    key_offset = offsets(start, row, key, heads, K)
    key_mask = row_in[:, None] & key_in
    query_offset = offsets(origin, token, key, heads, K)
    query_mask = token_in[:, None] & key_in
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
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        output_offset = offsets(origin, token, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        grad_output = tl.load(grad_outputs + output_offset, mask=token_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        written = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        asked, unit = narrowed(query_factor[:, None] * grad_output.to(tl.float32), dtype)
        state_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, ENTERING))
        written_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, FRESH))
        to_query += tl.dot(asked, tl.trans(state), input_precision=PRECISION) * state_unit
        to_score += tl.dot(asked, tl.trans(written), input_precision=PRECISION) * written_unit
    # Of pairs within one segment, with the queries before the keys: the others are never weighed, and may be large.
    paired = (token[:, None] >= row_token[None, :]) & (query_segment[:, None] == segment[None, :])
    of_score, score_unit = narrowed(tl.where(paired, to_score * put[None, :], 0.0), dtype)
    total = load_totals(totals, token, key, BQ, K).to(tl.float32)
    to_query *= tl.where((query_segment == 0)[:, None], tl.exp(total), 0.0)
    for level in tl.range(0, LEVELS, num_stages=1):
        size = 1 << level
        again = (level >> 8) * 128
        w = load_scaled(writers + key_offset + again, key_mask, write_scale)
        decayed = (w * level_factor(totals + again, row_token, key, size, TOKENS, BQ, K)).to(dtype)
        kept = level_kept(token, row_token, query_segment, segment, size)
        part = tl.where(kept, of_score, tl.zeros_like(of_score))
        weighed = tl.dot(part, decayed, input_precision=PRECISION)
        to_query += weighed * (score_unit * level_factor(totals + again, token, key, size, TOKENS, BQ, K))
    q = load_scaled(queries + query_offset, query_mask, query_scale)
    tl.store(grad_decay + query_offset, tl.dot(asks, q * to_query, input_precision=PRECISION), mask=query_mask)
    part = tl.where(own_token, of_score, tl.zeros_like(of_score))
    w = load_scaled(writers + key_offset, key_mask, write_scale)
    to_query += tl.dot(part, w.to(dtype), input_precision=PRECISION) * score_unit
    if NORMALIZE:
        q = load_scaled(queries + query_offset, query_mask, query_scale)
        to_query -= q * (tl.sum(to_query * q, 1) * query_factor * query_factor)[:, None]
    tl.store(grad_queries + query_offset, (to_query * query_scale[:, None]).to(narrow), mask=query_mask)

    # Then the keys, as they read and as they write; first of one another.
    to_lower = tl.zeros([C, C], tl.float32)
    to_rate = tl.zeros([C], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        inside = row_in[:, None] & (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        written = tl.load(fresh + value_offset, mask=inside, other=0.0)
        target = tl.load(residual + value_offset, mask=inside, other=0.0)
        unit = tl.load(unit_of(units, chunk, BLOCKS, block, RESIDUAL))
        unit *= tl.load(unit_of(units, chunk, BLOCKS, block, FRESH))
        to_lower += tl.dot(target, tl.trans(written), input_precision=PRECISION) * unit
        if BETA:
            to_rate += tl.sum(target.to(tl.float32) * written.to(tl.float32), 1) * unit
    key_factor = 1 / tl.load(factor + VALUE * C + row)
    if BETA:
        # Keys that only write are never normalised.
        write_factor = key_factor if TIED else 1 / write_scale
        tl.store(grad_beta + start + row * heads, to_rate * write_factor, mask=row_in)
    paired = (row[:, None] > row[None, :]) & (segment[:, None] == segment[None, :])
    to_lower = tl.where(paired, -rate[:, None] * to_lower * put[None, :], 0.0)
    of_lower, lower_unit = narrowed(to_lower, dtype)
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
        weight = level_factor(totals + again, row_token, key, size, TOKENS, BQ, K)
        k = load_scaled(keys + key_offset + again, key_mask, key_scale)
        if not TIED:
            k = level_keys(k, load_scaled(write_keys + key_offset + again, key_mask, write_scale), row_token, size)
        decayed = (k * weight).to(dtype)
        kept = level_kept(row_token, row_token, segment, segment, size)
        pairs = tl.where(kept, of_lower, tl.zeros_like(of_lower))
        to_read += (weight * lower_unit) * tl.dot(pairs, decayed, input_precision=PRECISION)
        column = column * score_unit + tl.dot(tl.trans(pairs), decayed, input_precision=PRECISION) * lower_unit
        to_write += weight * column

    # What they read of the entering state.
    of_state = tl.zeros([C, BK], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        target = tl.load(residual + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=(key < K)[:, None] & value_in, other=0.0)
        unit = tl.load(unit_of(units, chunk, BLOCKS, block, RESIDUAL))
        unit *= tl.load(unit_of(units, chunk, BLOCKS, block, ENTERING))
        of_state += tl.dot(target, tl.trans(state), input_precision=PRECISION) * unit
    total = load_totals(totals, row_token, key, BQ, K)
    to_read -= of_state * tl.where((segment == 0)[:, None], rate[:, None] * tl.exp(total.to(tl.float32)), 0.0)
    k = load_scaled(keys + key_offset, key_mask, key_scale)
    if TIED:
        w = k
        weight = k * (to_read - to_write)
    else:
        w = load_scaled(write_keys + key_offset, key_mask, write_scale)
        weight = k * to_read - w * to_write
    change = tl.dot(reads, weight, input_precision=PRECISION)
    if MICRO > 1:
        own = tl.where(row_token[:, None] == row_token[None, :], of_lower, tl.zeros_like(of_lower))
        to_read += tl.dot(own, w.to(dtype), input_precision=PRECISION) * lower_unit
        to_write += tl.dot(tl.trans(own), k.to(dtype), input_precision=PRECISION) * lower_unit
    part = tl.where(own_token, of_score, tl.zeros_like(of_score))
    q = load_scaled(queries + query_offset, query_mask, query_scale)
    to_write += tl.dot(tl.trans(part), q.to(dtype), input_precision=PRECISION) * score_unit
    if TIED:
        to_key = to_read + to_write
    else:
        to_key = to_write
        tl.store(grad_keys + key_offset, (to_read * key_scale[:, None]).to(narrow), mask=key_mask)
    tl.debug_barrier()
    change += tl.load(grad_decay + query_offset, mask=query_mask, other=0.0)

    # And what they write into the leaving one.
    of_state = tl.zeros([C, BK], tl.float32)
    kept_state = tl.zeros([BK], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        value = block * BV + tl.arange(0, BV)
        value_in = (value < V)[None, :]
        value_offset = offsets(start, row, value, heads, V)
        state_offset = chunk * (K * V) + key[:, None] * V + value[None, :]
        state_in = (key < K)[:, None] & value_in
        written = tl.load(fresh + value_offset, mask=row_in[:, None] & value_in, other=0.0)
        state = tl.load(entering + state_offset, mask=state_in, other=0.0)
        grad_state = tl.load(leaving + state_offset, mask=state_in, other=0.0)
        unit = tl.load(unit_of(units, chunk, BLOCKS, block, LEAVING))
        written_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, FRESH))
        state_unit = unit * tl.load(unit_of(units, chunk, BLOCKS, block, ENTERING))
        of_state += tl.dot(written, tl.trans(grad_state), input_precision=PRECISION) * written_unit
        kept_state += tl.sum(state.to(tl.float32) * grad_state.to(tl.float32), 1) * state_unit
    last = load_totals(totals, tl.full([C], BQ - 1, tl.int32), key, BQ, K)
    total = load_totals(totals, row_token, key, BQ, K)
    left = tl.exp((last - total).to(tl.float32))
    of_state *= tl.where((segment == last_of(segment, C))[:, None], put[:, None] * left, 0.0)
    to_key += of_state
    w = load_scaled(writers + key_offset, key_mask, write_scale)
    change = tl.dot(1.0 - reads, w * of_state, change, input_precision=PRECISION)
    change += (tl.load(carried + chunk * K + key, mask=key < K, other=0.0) * kept_state)[None, :]
    if RESET:
        begin = tl.load(reset + first + token, mask=token_in, other=0)
        change = tl.where((begin != 0)[:, None], 0.0, change)
    tl.debug_barrier()
    tl.store(grad_decay + query_offset, change, mask=query_mask)
    if NORMALIZE:
        k = load_scaled(keys + key_offset, key_mask, key_scale)
        to_key -= k * (tl.sum(to_key * k, 1) * key_factor * key_factor)[:, None]
    to_key *= write_scale[:, None]
    tl.store((grad_keys if TIED else grad_write_keys) + key_offset, to_key.to(narrow), mask=key_mask)
