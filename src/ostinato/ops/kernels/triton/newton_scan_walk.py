"""Channelwise cells walked step by step in registers, in segments of time that Newton's method joins.

The channels of ParaGRU and ParaLSTM never meet, so a lane can walk its channel through all steps with the
state in registers: inputs are read once, outputs written once, and what it costs is the latency of one step
after another. Where there are too few channels to fill the card, time is cut into segments that are walked
at once, each from a guess s_j of the state that enters it. Newton's method then acts on these states alone:
with Φ_j the walk through segment j and DΦ_j its Jacobian, the product of the steps' Jacobians,

    s_{j+1} ← Φ_j(s_j) + DΦ_j (s_j^new − s_j),

a linear recurrence over segments. After k walks the first k segments are exact whatever the guess; within a
segment every step is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.newton_scan_cells import LOG2E, gru_pull, gru_step, lstm_pull, lstm_step
from ostinato.ops.kernels.triton.newton_scan_tiles import at_step, marks, put_step, put_tile, tile_at


@triton.jit(do_not_specialize=["nothing"])
def walk(
    x_pointer,
    a_pointer,
    p_pointer,
    h_pointer,  # (batch, segments, channels), the states that enter
    c_pointer,
    fresh_pointer,
    out_pointer,
    cell_pointer,
    last_h_pointer,  # (batch, segments × slots, channels), the states that leave
    last_c_pointer,
    peak_pointer,  # the same
    products_pointer,  # with JOINED (batch, segments, 1 or 4, channels): Jacobians of the segments
    done_pointer,  # with GUARDED (batch, channel blocks): not to be walked again
    gap_pointer,  # (batch, channels): zero after a walk in one piece
    time,
    channels,
    segments,
    length,
    lead,  # unless STORED: how many steps before a segment its guess is made from, from zero
    slots,  # as how many segments the results of this one count
    x_batch,
    x_time: tl.constexpr,
    x_gate: tl.constexpr,
    CHANNELS: tl.constexpr,
    nothing,  # 0. Not known to be: so no alignment is, and each lane loads and keeps one channel
    LSTM: tl.constexpr,
    FRESH: tl.constexpr,
    STORED: tl.constexpr,
    KEEP: tl.constexpr,
    JOINED: tl.constexpr,
    GUARDED: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All states of h_t = f(h_{t−1}, x_t), and the largest |state| of each channel, NaN if one was."""
    blocks = tl.cdiv(channels, BLOCK_C)
    block = tl.program_id(0) % blocks
    segment = (tl.program_id(0) // blocks) % segments
    batch = (tl.program_id(0) // blocks // segments).to(tl.int64)
    c = (block * BLOCK_C).to(tl.int64) + tl.arange(0, BLOCK_C)
    inside = c < channels
    start = segment * length
    end = min(start + length, time)
    if not STORED:
        # A guess of the state that enters: a walk through the last steps before the segment.
        end = start
        start = tl.maximum(start - lead, 0)
    if GUARDED:
        done = tl.load(done_pointer + batch * blocks + block) != 0
        inside = inside & (done == 0)
        end = tl.where(done, start, end)
    EVEN: tl.constexpr = EVEN_T and EVEN_C
    here = (batch * segments + segment) * channels + c
    steps = tl.arange(0, BLOCK_T)
    x_pointer += batch * x_batch + nothing
    fresh_pointer += batch * time
    out_pointer += batch * time * CHANNELS + nothing
    cell_pointer += batch * time * CHANNELS + nothing
    h = tl.load(h_pointer + here, mask=inside, other=0.0).to(tl.float32)
    a0 = tl.load(a_pointer + c, mask=inside, other=0.0).to(tl.float32)
    a1 = tl.load(a_pointer + channels + c, mask=inside, other=0.0).to(tl.float32)
    a2 = tl.load(a_pointer + 2 * channels + c, mask=inside, other=0.0).to(tl.float32)
    if LSTM:
        cell = tl.load(c_pointer + here, mask=inside, other=0.0).to(tl.float32)
        p0 = tl.load(p_pointer + c, mask=inside, other=0.0).to(tl.float32) * -LOG2E
        p1 = tl.load(p_pointer + channels + c, mask=inside, other=0.0).to(tl.float32) * -LOG2E
        s0, s1, s2 = -LOG2E, 1.0, -LOG2E
    else:
        cell = h
        s0, s1, s2 = -LOG2E, -LOG2E, 1.0
    a0, a1, a2 = a0 * s0, a1 * s1, a2 * s2
    peak = tl.zeros([BLOCK_C], tl.float32)
    zero = tl.zeros([BLOCK_C], tl.float32)
    dhh, dch, dhc, dcc = zero + 1.0, zero, zero, zero + 1.0
    x0 = tile_at(x_pointer, start, steps, c, x_time, time, inside, EVEN)
    x1 = tile_at(x_pointer + x_gate, start, steps, c, x_time, time, inside, EVEN)
    x2 = tile_at(x_pointer + 2 * x_gate, start, steps, c, x_time, time, inside, EVEN)
    if FRESH:
        fresh = marks(fresh_pointer, start, steps, time)
    for _tile in range(tl.cdiv(end - start, BLOCK_T)):
        # The next tile is under way while this one is walked.
        ahead = start + BLOCK_T
        if EVEN:
            ahead = min(ahead, time - BLOCK_T)
        y0 = tile_at(x_pointer, ahead, steps, c, x_time, time, inside, EVEN)
        y1 = tile_at(x_pointer + x_gate, ahead, steps, c, x_time, time, inside, EVEN)
        y2 = tile_at(x_pointer + 2 * x_gate, ahead, steps, c, x_time, time, inside, EVEN)
        if FRESH:
            next_fresh = marks(fresh_pointer, start + BLOCK_T, steps, time)
        x0, x1, x2 = x0.to(tl.float32) * s0, x1.to(tl.float32) * s1, x2.to(tl.float32) * s2
        hs = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        cells = hs
        for i in tl.static_range(BLOCK_T):
            if FRESH:
                begins = ((fresh >> i) & 1) != 0
                h = tl.where(begins, 0.0, h)
                if JOINED:
                    dhh, dch = tl.where(begins, 0.0, dhh), tl.where(begins, 0.0, dch)
                    dhc, dcc = tl.where(begins, 0.0, dhc), tl.where(begins, 0.0, dcc)
            if LSTM:
                if FRESH:
                    cell = tl.where(begins, 0.0, cell)
                f, z, o, next_cell, squashed, next_h = lstm_step(
                    cell, h, at_step(x0, steps, i), at_step(x1, steps, i), at_step(x2, steps, i), a0, a1, a2, p0, p1
                )
                if JOINED:
                    through, _, _, _, keep, turn, back = lstm_pull(
                        cell, f, z, o, squashed, p0 / -LOG2E, p1 / -LOG2E, a0 / -LOG2E, a1, a2 / -LOG2E
                    )
                    if not EVEN:
                        counts = start + i < end
                        through, keep = tl.where(counts, through, 0.0), tl.where(counts, keep, 1.0)
                        turn, back = tl.where(counts, turn, 0.0), tl.where(counts, back, 1.0)
                    dcc, dch = tl.fma(keep, dcc, turn * dhc), tl.fma(keep, dch, turn * dhh)
                    dhc, dhh = tl.fma(through, dcc, back * dhc), tl.fma(through, dch, back * dhh)
                if EVEN:
                    cell = next_cell
                else:
                    cell = tl.where(start + i < end, next_cell, cell)
                if KEEP:
                    cells = put_step(cells, steps, i, cell)
                peak = tl.maximum(peak, tl.abs(cell), propagate_nan=tl.PropagateNan.ALL)
            else:
                z, r, n, next_h = gru_step(
                    h, at_step(x0, steps, i), at_step(x1, steps, i), at_step(x2, steps, i), a0, a1, a2
                )
                if JOINED:
                    _, _, _, jacobian = gru_pull(h, z, r, n, a0 / -LOG2E, a1 / -LOG2E, a2)
                    if not EVEN:
                        jacobian = tl.where(start + i < end, jacobian, 1.0)
                    dhh *= jacobian
            if EVEN:
                h = next_h
            else:
                h = tl.where(start + i < end, next_h, h)
            peak = tl.maximum(peak, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
            hs = put_step(hs, steps, i, h)
        if STORED:
            put_tile(out_pointer, hs, start, steps, c, CHANNELS, end, inside, EVEN)
            if KEEP:
                put_tile(cell_pointer, cells, start, steps, c, CHANNELS, end, inside, EVEN)
        x0, x1, x2 = y0, y1, y2
        if FRESH:
            fresh = next_fresh
        start += BLOCK_T
    there = (batch * segments * slots + segment + slots - 1) * channels + c
    tl.store(last_h_pointer + there, h, mask=inside)
    if LSTM:
        tl.store(last_c_pointer + there, cell, mask=inside)
    if GUARDED and not JOINED:
        tl.store(gap_pointer + batch * channels + c, zero, mask=inside)
    for slot in range(slots):
        tl.store(peak_pointer + (batch * segments * slots + segment + slot) * channels + c, peak, mask=inside)
    if JOINED:
        kinds: tl.constexpr = 4 if LSTM else 1
        products = products_pointer + (batch * segments + segment) * channels * kinds + c
        tl.store(products, dhh, mask=inside)
        if LSTM:
            tl.store(products + channels, dch, mask=inside)
            tl.store(products + 2 * channels, dhc, mask=inside)
            tl.store(products + 3 * channels, dcc, mask=inside)


@triton.jit
def join(
    h_pointer,  # (batch, segments, channels), the states that enter: those that were walked from, then new ones
    c_pointer,
    last_h_pointer,  # (batch, segments, channels), the states that left
    last_c_pointer,
    products_pointer,
    gap_pointer,  # (batch, channels)
    done_pointer,  # (batch, channel blocks): 0, or how many walks it took
    channels,
    segments,
    count,  # of walks, with this one
    tolerance,
    LSTM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One step of Newton's method on the states between segments, unless those fit that were walked from."""
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    done = tl.load(done_pointer + tl.program_id(0)) != 0
    inside = inside & (done == 0)
    kinds: tl.constexpr = 4 if LSTM else 1
    gap = tl.zeros([BLOCK_C], tl.float32)
    change_h = gap
    change_c = gap
    for segment in tl.range(0, tl.where(done, 0, segments - 1), num_stages=4):
        here = (batch * segments + segment) * channels + c
        products = products_pointer + (batch * segments + segment) * channels * kinds + c
        end = tl.load(last_h_pointer + here, mask=inside, other=0.0)
        old = tl.load(h_pointer + here + channels, mask=inside, other=0.0)
        hh = tl.load(products, mask=inside, other=0.0)
        # The largest distance, NaN if one is; relative to the state where that is large.
        apart = tl.abs(end - old) / tl.maximum(tl.abs(end), 1.0, propagate_nan=tl.PropagateNan.ALL)
        gap = tl.maximum(gap, apart, propagate_nan=tl.PropagateNan.ALL)
        if LSTM:
            end_c = tl.load(last_c_pointer + here, mask=inside, other=0.0)
            old_c = tl.load(c_pointer + here + channels, mask=inside, other=0.0)
            ch = tl.load(products + channels, mask=inside, other=0.0)
            hc = tl.load(products + 2 * channels, mask=inside, other=0.0)
            cc = tl.load(products + 3 * channels, mask=inside, other=0.0)
            apart = tl.abs(end_c - old_c) / tl.maximum(tl.abs(end_c), 1.0, propagate_nan=tl.PropagateNan.ALL)
            gap = tl.maximum(gap, apart, propagate_nan=tl.PropagateNan.ALL)
            new_c = end_c + cc * change_c + ch * change_h
            new = end + hc * change_c + hh * change_h
            change_c = new_c - old_c
            tl.store(c_pointer + here + channels, new_c, mask=inside)
        else:
            new = end + hh * change_h
        change_h = new - old
        tl.store(h_pointer + here + channels, new, mask=inside)
    tl.store(gap_pointer + batch * channels + c, gap, mask=inside)
    fits = tl.sum(tl.where(inside & ((gap <= tolerance) == 0), 1, 0), axis=0) == 0
    tl.store(done_pointer + tl.program_id(0), count, mask=fits & (done == 0))
