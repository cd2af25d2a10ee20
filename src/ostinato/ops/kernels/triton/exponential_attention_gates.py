"""The gates of `exponential_attention` in Triton: the running maximum before the memory's walk, its gradient after it.

In chunks of L tokens, with F the sum of the log-forget gates from the chunk's first token (that of a reset counts
as 0), m_in the maximum that enters the chunk and m_out, F_L those at its end:

    m_t     = F_t + max(m_in, max_{s ≤ t} i_s − F_s)        a reset starts anew from f_t
    reach   = F_t − m_t,   source = F_s − i_s               token s weighs exp(reach_t − source_s) ≤ 1 at token t
    enter_t = exp(F_t + m_in − m_t)                         what the entering state weighs at t; 0 past a reset
    leave_s = exp(F_L − F_s + i_s − m_out)                  what s weighs in the leaving state; 0 before a reset
    carried = exp(F_L + m_in − m_out)                       0 over a reset

All of it is a few numbers per token, so it is computed in float64 and handed on in float32, logarithms to base 2,
as contiguous rows (batch · heads, chunks · L). F is handed on apart from `reach` and `source` for float32 inputs:
(F_t − F_s) + (rest) keeps the digits of a weak decay after a strong one.
"""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("time", "heads", "chunks", "length", "segment", "segments", "rows", "batches")
"""Arguments by whose value no kernel is compiled anew."""


@triton.jit
def _maximum(left, right):
    return tl.maximum(left, right)


@triton.jit
def _maximum_since_reset(left_new, left, right_new, right):
    return tl.maximum(left_new, right_new), tl.where(right_new > 0, right, tl.maximum(left, right))


@triton.jit
def _max_plus(left_added, left_least, right_added, right_least):
    return left_added + right_added, tl.maximum(left_least + right_added, right_least)


@triton.jit
def _affine(left_factor, left_added, right_factor, right_added):
    return left_factor * right_factor, left_added * right_factor + right_added


@triton.jit(do_not_specialize=SIZES)
def gates_kernel(
    log_input,
    log_forget,
    reset,
    initial,
    decayed,
    reach,
    source,
    enter,
    leave,
    carried,
    maximum,
    first_token,
    last_maximum,
    block_added,
    block_least,
    time,
    heads,
    chunks,
    SUMMARY: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    EXACT: tl.constexpr,
    LENGTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A block of `CHUNKS` chunks of one (batch, head). `maximum` is float64; the rest as in the file's head.

    With `SUMMARY`, only the map m → max(m + added, least) that the block is; the others then take what enters their
    block from the maps of those before (`BLOCKS`, a power of two, is no less than there are blocks).
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0)
    batch = row // heads
    head = row % heads
    own = row.to(tl.int64) * chunks * LENGTH
    tokens = batch.to(tl.int64) * time
    place = tl.arange(0, LENGTH)[None, :]
    chunk_place = tl.arange(0, CHUNKS)
    block = tl.program_id(1)
    first = block * CHUNKS
    chunk = first + chunk_place
    token = chunk[:, None] * LENGTH + place
    inside = token < time
    where = (tokens + token) * heads + head
    written = tl.load(log_input + where, mask=inside, other=float("-inf")).to(tl.float64)
    forget = tl.load(log_forget + where, mask=inside, other=0.0).to(tl.float64)
    least = written
    if HAS_RESET:
        new = tl.load(reset + tokens + token, mask=inside, other=0).to(tl.int32)
        least = tl.where(new > 0, tl.maximum(forget, written), written)
        forget = tl.where(new > 0, 0.0, forget)
    total = tl.sum(forget, axis=1)
    forget = tl.cumsum(forget, axis=1)
    level = least - forget
    if HAS_RESET:
        begun = tl.associative_scan(tl.where(new > 0, place + 1, 0), 1, _maximum)
        seen, level = tl.associative_scan((new, level), 1, _maximum_since_reset)
        resets = tl.max(seen, axis=1)
        last_begun = tl.max(begun, axis=1)
    else:
        level = tl.associative_scan(level, 1, _maximum)
    top = tl.max(tl.where(place == LENGTH - 1, level, float("-inf")), axis=1)
    added = total
    if HAS_RESET:
        added = tl.where(resets > 0, float("-inf"), total)
    sums, leasts = tl.associative_scan((added, total + top), 0, _max_plus)
    if SUMMARY:
        at_end = chunk_place == CHUNKS - 1
        here = row * tl.num_programs(1) + block
        tl.store(block_added + here, tl.max(tl.where(at_end, sums, float("-inf"))))
        tl.store(block_least + here, tl.max(tl.where(at_end, leasts, float("-inf"))))
    else:
        running = tl.zeros([1], tl.float64)
        if HAS_INITIAL:
            running += tl.load(initial + row).to(tl.float64)
        if BLOCKS > 1:
            earlier_block = tl.arange(0, BLOCKS)
            known = row * tl.num_programs(1) + earlier_block
            before_added, before_least = tl.associative_scan(
                (
                    tl.load(block_added + known, mask=earlier_block < block, other=0.0),
                    tl.load(block_least + known, mask=earlier_block < block, other=float("-inf")),
                ),
                0,
                _max_plus,
            )
            all_of_them = earlier_block == BLOCKS - 1
            before_added = tl.max(tl.where(all_of_them, before_added, float("-inf")))
            running = tl.maximum(running + before_added, tl.max(tl.where(all_of_them, before_least, float("-inf"))))
        leaving = tl.maximum(running + sums, leasts)
        earlier = chunk_place[:, None] - 1 == chunk_place[None, :]
        entering = tl.max(tl.where(earlier, leaving[None, :], float("-inf")), axis=1)
        entering = tl.where(chunk_place == 0, running, entering)

        past = tl.maximum(entering[:, None], level)
        if HAS_RESET:
            past = tl.where(seen > 0, level, past)
        now = forget + past
        grown = tl.exp2(((forget + entering[:, None] - now) * LOG2_E).to(tl.float32))
        kept = tl.exp2(((total[:, None] - forget + written - leaving[:, None]) * LOG2_E).to(tl.float32))
        through = tl.exp2(((total + entering - leaving) * LOG2_E).to(tl.float32))
        if HAS_RESET:
            grown = tl.where(seen > 0, 0.0, grown)
            kept = tl.where(begun == last_begun[:, None], kept, 0.0)
            through = tl.where(resets > 0, 0.0, through)
        there = (chunk < chunks)[:, None] & (place >= 0)
        if HAS_RESET:
            tl.store(first_token + own + token, tl.maximum(begun - 1, 0), mask=there)
        apart = 0.0
        if EXACT:
            high = (forget * LOG2_E).to(tl.float32)
            tl.store(decayed + own + token, high, mask=there)
            apart = high.to(tl.float64)
        tl.store(reach + own + token, ((forget - now) * LOG2_E - apart).to(tl.float32), mask=there)
        tl.store(source + own + token, ((forget - written) * LOG2_E - apart).to(tl.float32), mask=there)
        tl.store(enter + own + token, grown, mask=there)
        tl.store(leave + own + token, kept, mask=there)
        tl.store(maximum + own + token, now, mask=there)
        tl.store(carried + row * chunks + chunk, through, mask=chunk < chunks)
        if first + CHUNKS >= chunks:
            tl.store(last_maximum + row, tl.max(tl.where(chunk_place == CHUNKS - 1, leaving, float("-inf"))))


@triton.jit
def _taken(before, forget, written):
    """The derivative of max(f + m, i) by its first argument; at a tie half, as torch.maximum has it."""
    decayed = forget + before
    return tl.where(decayed > written, 1.0, tl.where(decayed == written, 0.5, 0.0))


@triton.jit(do_not_specialize=SIZES)
def gate_gradients_kernel(
    log_input,
    log_forget,
    reset,
    initial,
    maximum,
    through,
    inner,
    by_maximum,
    by_last_maximum,
    grad_input,
    grad_forget,
    grad_initial,
    block_factor,
    block_sum,
    time,
    heads,
    chunks,
    rows,
    SUMMARY: tl.constexpr,
    HAS_RESET: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
    LENGTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A block of one (batch, head), from its last token to its first: gradients of both gates and the initial maximum.

    Blocks count from the end, and take what enters them from summaries as in `gates_kernel`.

    With M_ts the gradient of log W_ts (see `chunk_gradients_kernel`), f_t is paid by all pairs s < t ≤ t': those within
    the chunk (`inner` 0: Σ_s M_ts, less `inner` 3: Σ_t M_ts, both over s < t), from the entering state (`inner` 1),
    into the leaving one (`inner` 2) and through the chunk (`through`). i_s is paid by `inner` 2, 3 and M_ss, `inner` 4.
    No pair that is not paid for by a token is added and subtracted, but where it is as small as those that are: so
    strong decays keep their digits. m_t, which h does not depend on but for ε, passes what it is paid to f_t and
    m_{t−1}, or to i_t.
    """
    row = tl.program_id(0)
    batch = row // heads
    head = row % heads
    length = chunks.to(tl.int64) * LENGTH
    own = row * length
    plane = rows * length
    tokens = batch.to(tl.int64) * time
    start = tl.zeros([1], tl.float64)
    if HAS_INITIAL:
        start += tl.load(initial + row).to(tl.float64)
    place = LENGTH - 1 - tl.arange(0, LENGTH)[None, :]
    chunk_place = tl.arange(0, CHUNKS)
    block = tl.program_id(1)
    done = block * CHUNKS
    chunk = chunks - 1 - done - chunk_place
    token = chunk[:, None] * LENGTH + place
    inside = (token >= 0) & (token < time)
    where = (tokens + token) * heads + head
    written = tl.load(log_input + where, mask=inside, other=0.0).to(tl.float64)
    forget = tl.load(log_forget + where, mask=inside, other=0.0).to(tl.float64)
    before = tl.load(maximum + own + token - 1, mask=inside & (token > 0), other=0.0)
    before = tl.where(token == 0, start[:, None], before)
    # The token after this one, whose maximum may go on from this one's.
    followed = inside & (token + 1 < time)
    next_input = tl.load(log_input + where + heads, mask=followed, other=0.0).to(tl.float64)
    next_forget = tl.load(log_forget + where + heads, mask=followed, other=0.0).to(tl.float64)
    now = tl.load(maximum + own + token, mask=inside, other=0.0)
    passed = _taken(now, next_forget, next_input)
    if HAS_RESET:
        new = tl.load(reset + tokens + token, mask=inside, other=0).to(tl.int32)
        before = tl.where(new > 0, 0.0, before)
        passed = tl.where(tl.load(reset + tokens + token + 1, mask=followed, other=0).to(tl.int32) > 0, 0.0, passed)
    passed = tl.where(followed, passed, 1.0).to(tl.float32)
    taken = _taken(before, forget, written).to(tl.float32)
    paid = tl.load(by_maximum + own + token, mask=inside, other=0.0)
    factors, sums = tl.associative_scan(
        (tl.reshape(passed, [CHUNKS * LENGTH]), tl.reshape(paid, [CHUNKS * LENGTH])), 0, _affine
    )
    flat_place = tl.arange(0, CHUNKS * LENGTH)
    if SUMMARY:
        here = row * tl.num_programs(1) + block
        at_end = flat_place == CHUNKS * LENGTH - 1
        tl.store(block_factor + here, tl.sum(tl.where(at_end, factors, 0.0)))
        tl.store(block_sum + here, tl.sum(tl.where(at_end, sums, 0.0)))
    else:
        running = 0.0
        if HAS_LAST:
            running += tl.load(by_last_maximum + row)
        if BLOCKS > 1:
            later_block = tl.arange(0, BLOCKS)
            known = row * tl.num_programs(1) + later_block
            later_factor, later_sum = tl.associative_scan(
                (
                    tl.load(block_factor + known, mask=later_block < block, other=1.0),
                    tl.load(block_sum + known, mask=later_block < block, other=0.0),
                ),
                0,
                _affine,
            )
            all_of_them = later_block == BLOCKS - 1
            running *= tl.sum(tl.where(all_of_them, later_factor, 0.0))
            running += tl.sum(tl.where(all_of_them, later_sum, 0.0))
        of_maximum = tl.reshape(factors * running + sums, [CHUNKS, LENGTH])
        at = inner + own + token
        ended = tl.load(at, mask=inside, other=0.0)
        entering = tl.load(at + plane, mask=inside, other=0.0)
        # Of the token before, within the chunk.
        leaving = tl.load(at + 2 * plane - 1, mask=inside & (place > 0), other=0.0)
        begun = tl.load(at + 3 * plane, mask=inside, other=0.0)
        whole = tl.load(through + row * chunks + chunk, mask=chunk >= 0, other=0.0)
        of_input = begun + tl.load(at + 2 * plane, mask=inside, other=0.0)
        of_input += tl.load(at + 4 * plane, mask=inside, other=0.0) + (1.0 - taken) * of_maximum
        summed = tl.cumsum(ended - begun + entering, axis=1) + tl.cumsum(leaving, axis=1, reverse=True) + whole[:, None]
        if HAS_RESET:
            summed = tl.where(new > 0, 0.0, summed)
        tl.store(grad_input + where, of_input, mask=inside)
        tl.store(grad_forget + where, summed + taken * of_maximum, mask=inside)
        if HAS_INITIAL:
            first = taken * of_maximum
            if HAS_RESET:
                first = tl.where(new > 0, 0.0, first)
            tl.store(grad_initial + row + token * 0, first, mask=token == 0)
