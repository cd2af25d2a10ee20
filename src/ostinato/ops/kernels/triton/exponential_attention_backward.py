"""The gradients of `exponential_attention`'s memory in Triton: all gradients of a chunk at once.

With D = max(|den|, exp(−m)) + ε, r = 1/D, g the gradient of h and δ_t = (h_t · g_t) side_t (the normaliser's share:
side is the sign of den where |den| is the greater, else 0), the gradients of num and den are r g and −r δ. Over a
chunk, with W the weights of its tokens, C and n the entering state, Ċ and ṅ the gradient of the leaving one (both
computed before, by `states_kernel` forward and in reverse):

    S = q kᵀ,   P = r W ⊙ S,   dS = r W ⊙ (g vᵀ − δ)
    dv = Pᵀ g + leave (k Ċ)
    dk = dSᵀ q + leave (v Ċᵀ + ṅ)
    dq = dS k + enter r (g Cᵀ − δ n)
    Ċ ← carried Ċ + qᵀ (enter r g),   ṅ ← carried ṅ − Σ enter r δ q

The gradient of log W_ts is M = S ⊙ dS.

In bfloat16 what is computed enters products in two terms, and δ is made of h with two: pairs of tokens, forward the
memory that is read, and what is added to it. One rounding each is left, of the states at the borders of chunks, C and Ċ
here. In units of the error that rounding the exact result makes (64 channels, 192 to 320 steps, in the interpreter): h,
dq and dk err by 1.0, dv by 1.0 to 1.3, also where decays are weak (log-forget −4e-3) and where keys have one sign; dq
by 1.3 where both is so. With one term everywhere dq errs by 1.8 to 3.2: δ and dS nearly cancel, q_t · dq_t = 0 where
the denominator is den, so that errors of h stand beside a small result, the more where denominators come near 0.
Without the second term of the memory h errs by 1.6 and dq by 1.5 at weak decays, up to 3 where they come near 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import add_by_left, operand
from ostinato.ops.kernels.triton.exponential_attention_gates import SIZES
from ostinato.ops.kernels.triton.exponential_attention_memory import (
    chunk_weights,
    load_tile,
    store_tile,
)


@triton.jit(do_not_specialize=SIZES)
def shares_kernel(
    outputs,
    lost,
    grads,
    inverse,
    side,
    enter,
    delta,
    read,
    read_sum,
    by_maximum,
    heads,
    length,
    eps,
    HAS_LOST: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """δ, what a token reads of the entering state (enter r; for the normaliser −enter r δ), and the gradient of m.

    h depends on m only through ε: −(h · g) ε r.
    """
    row = tl.program_id(0)
    batch = row // heads
    head = row % heads
    token = tl.program_id(1) * LENGTH
    at = row.to(tl.int64) * length + token + tl.arange(0, LENGTH)
    h = load_tile(outputs, batch, head, token, 0, LENGTH, BLOCK_VALUES).to(tl.float32)
    if HAS_LOST:
        h += load_tile(lost, batch, head, token, 0, LENGTH, BLOCK_VALUES).to(tl.float32)
    g = load_tile(grads, batch, head, token, 0, LENGTH, BLOCK_VALUES)
    along = tl.sum(h * g.to(tl.float32), axis=1)
    factor = tl.load(inverse + at)
    share = along * tl.load(side + at)
    seen = tl.load(enter + at) * factor
    tl.store(delta + at, share)
    tl.store(read + at, seen)
    tl.store(read_sum + at, -seen * share)
    tl.store(by_maximum + at, -along * eps * factor)


@triton.jit
def _by_scores(
    values, grads, decayed, reach, source, first_token, inverse, delta, batch, head, token, begin,
    HAS_RESET: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    LENGTH: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    """g, v and dS of one chunk."""
    at = begin + tl.arange(0, LENGTH)
    g = load_tile(grads, batch, head, token, 0, LENGTH, BLOCK_VALUES)
    v = load_tile(values, batch, head, token, 0, LENGTH, BLOCK_VALUES)
    weights = chunk_weights(decayed, reach, source, first_token, begin, HAS_RESET, EXACT, LENGTH)
    weights *= tl.load(inverse + at)[:, None]
    by_scores = tl.dot(g, tl.trans(v), input_precision=PRECISION) - tl.load(delta + at)[:, None]
    return g, v, by_scores * weights


@triton.jit(do_not_specialize=SIZES)
def chunk_gradients_kernel(
    queries, keys, values, grads,
    decayed, reach, source, leave, carried, first_token, inverse, delta, read, read_sum,
    states, sums, rising, rising_sums,
    grad_queries, grad_keys, grad_values, inner, through,
    heads, chunks, rows,
    KEYS: tl.constexpr, VALUES: tl.constexpr, HAS_RESET: tl.constexpr, EXACT: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, LENGTH: tl.constexpr, TWO: tl.constexpr,
    BLOCK_KEYS: tl.constexpr, BLOCK_VALUES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Three programs a chunk, for dq, dk and dv; they run side by side and find each other's loads in the cache.

    Those of dq and dk also sum up what `gate_gradients_kernel` takes.
    """
    task = tl.program_id(0)
    chunk = tl.program_id(1)
    row = tl.program_id(2)
    batch = row // heads
    head = row % heads
    token = chunk * LENGTH
    place = tl.arange(0, LENGTH)
    begin = row.to(tl.int64) * chunks * LENGTH + token
    at = begin + place
    plane = rows.to(tl.int64) * chunks * LENGTH
    of_chunk = (row.to(tl.int64) * chunks + chunk) * KEYS
    if task == 0:
        g, v, by_scores = _by_scores(
            values, grads, decayed, reach, source, first_token, inverse, delta, batch, head, token, begin,
            HAS_RESET, EXACT, WIDE, PRECISION, LENGTH, BLOCK_VALUES,
        )  # fmt: skip
        seen = tl.load(read + at)
        seen_sum = tl.load(read_sum + at)
        into = tl.zeros([LENGTH], tl.float32)
        for key in tl.range(0, KEYS, BLOCK_KEYS, num_stages=STAGES):
            channel = key + tl.arange(0, BLOCK_KEYS)
            c = load_tile(states, row, chunk, key, 0, BLOCK_KEYS, BLOCK_VALUES)
            k = load_tile(keys, batch, head, token, key, LENGTH, BLOCK_KEYS)
            q = load_tile(queries, batch, head, token, key, LENGTH, BLOCK_KEYS)
            n = tl.load(sums + of_chunk + channel, mask=channel < KEYS, other=0.0)
            by_queries = (
                tl.dot(g.to(WIDE), tl.trans(operand(c, WIDE, PRECISION)), input_precision=PRECISION) * seen[:, None]
            )
            by_queries += seen_sum[:, None] * n[None, :]
            into += tl.sum(q.to(tl.float32) * by_queries, axis=1)
            by_queries = add_by_left(by_queries, by_scores, k, WIDE, PRECISION, TWO)
            store_tile(grad_queries, by_queries, batch, head, token, key, LENGTH, BLOCK_KEYS)
        tl.store(inner + plane + at, into)
    elif task == 1:
        g, v, by_scores = _by_scores(
            values, grads, decayed, reach, source, first_token, inverse, delta, batch, head, token, begin,
            HAS_RESET, EXACT, WIDE, PRECISION, LENGTH, BLOCK_VALUES,
        )  # fmt: skip
        kept = tl.load(leave + at)
        scores = tl.zeros([LENGTH, LENGTH], tl.float32)
        out = tl.zeros([LENGTH], tl.float32)
        over = 0.0
        for key in tl.range(0, KEYS, BLOCK_KEYS, num_stages=STAGES):
            channel = key + tl.arange(0, BLOCK_KEYS)
            r = load_tile(rising, row, chunk, key, 0, BLOCK_KEYS, BLOCK_VALUES)
            c = load_tile(states, row, chunk, key, 0, BLOCK_KEYS, BLOCK_VALUES)
            k = load_tile(keys, batch, head, token, key, LENGTH, BLOCK_KEYS)
            q = load_tile(queries, batch, head, token, key, LENGTH, BLOCK_KEYS)
            n = tl.load(sums + of_chunk + channel, mask=channel < KEYS, other=0.0)
            rn = tl.load(rising_sums + of_chunk + channel, mask=channel < KEYS, other=0.0)
            over += tl.sum(c.to(tl.float32) * r.to(tl.float32)) + tl.sum(n * rn)
            scores = tl.dot(q, tl.trans(k), acc=scores, input_precision=PRECISION)
            by_keys = tl.dot(v.to(WIDE), tl.trans(operand(r, WIDE, PRECISION)), input_precision=PRECISION)
            by_keys = (by_keys + rn[None, :]) * kept[:, None]
            out += tl.sum(k.to(tl.float32) * by_keys, axis=1)
            by_keys = add_by_left(by_keys, tl.trans(by_scores), q, WIDE, PRECISION, TWO)
            store_tile(grad_keys, by_keys, batch, head, token, key, LENGTH, BLOCK_KEYS)
        pairs = scores * by_scores
        strict = tl.where(place[:, None] > place[None, :], pairs, 0.0)
        tl.store(inner + at, tl.sum(strict, axis=1))
        tl.store(inner + 2 * plane + at, out)
        tl.store(inner + 3 * plane + at, tl.sum(strict, axis=0))
        tl.store(inner + 4 * plane + at, tl.sum(tl.where(place[:, None] == place[None, :], pairs, 0.0), axis=1))
        tl.store(through + row * chunks + chunk, over * tl.load(carried + row * chunks + chunk))
    else:
        scores = tl.zeros([LENGTH, LENGTH], tl.float32)
        by_values = tl.zeros([LENGTH, BLOCK_VALUES], tl.float32)
        for key in tl.range(0, KEYS, BLOCK_KEYS, num_stages=STAGES):
            q = load_tile(queries, batch, head, token, key, LENGTH, BLOCK_KEYS)
            k = load_tile(keys, batch, head, token, key, LENGTH, BLOCK_KEYS)
            r = load_tile(rising, row, chunk, key, 0, BLOCK_KEYS, BLOCK_VALUES)
            scores = tl.dot(q, tl.trans(k), acc=scores, input_precision=PRECISION)
            by_values = tl.dot(k.to(WIDE), operand(r, WIDE, PRECISION), acc=by_values, input_precision=PRECISION)
        g = load_tile(grads, batch, head, token, 0, LENGTH, BLOCK_VALUES)
        weights = chunk_weights(decayed, reach, source, first_token, begin, HAS_RESET, EXACT, LENGTH)
        weights *= tl.load(inverse + at)[:, None]
        by_values *= tl.load(leave + at)[:, None]
        by_values = add_by_left(by_values, tl.trans(scores * weights), g, WIDE, PRECISION, TWO)
        store_tile(grad_values, by_values, batch, head, token, 0, LENGTH, BLOCK_VALUES)
