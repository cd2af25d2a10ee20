"""The adjoint of the channelwise cells, in registers, and what it means for inputs, weights and states.

It is linear, and its Jacobians are known beforehand: a step of its chain is two multiplications, and time is
cut into segments whose effects are composed. A tile is (steps, channels) with a lane for each channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.newton_scan_cells import LOG2E, gru_pull, gru_step, lstm_pull, lstm_step
from ostinato.ops.kernels.triton.newton_scan_tiles import at_step, marks, put_step, put_tile, tile_at, tile_before


@triton.jit(do_not_specialize=["nothing"])
def walk_back(
    x_pointer,
    a_pointer,
    p_pointer,
    h_pointer,  # (batch, channels), the initial state
    c_pointer,
    fresh_pointer,
    states_pointer,  # (batch, time, channels)
    cell_pointer,
    grad_pointer,  # (batch, time, channels)
    mu_h_pointer,  # (batch, segments, channels): what reaches the segment from the one after it
    mu_c_pointer,
    grad_x_pointer,  # (batch, time, 3, channels)
    grad_weights_pointer,  # (batch, segments, 3 or 5, channels)
    grad_h_pointer,  # (batch, channels); with TOTALS (batch, segments, 1 or 2, channels)
    grad_c_pointer,
    products_pointer,  # with TOTALS (batch, segments, 1 or 4, channels)
    time,
    channels,
    segments,
    length,
    x_batch,
    x_time: tl.constexpr,
    x_gate: tl.constexpr,
    CHANNELS: tl.constexpr,
    nothing,
    LSTM: tl.constexpr,
    FRESH: tl.constexpr,
    TOTALS: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The adjoint μ_t = g_t + J_{t+1}ᵀ μ_{t+1}, and what it means for inputs, weights and the initial state."""
    blocks = tl.cdiv(channels, BLOCK_C)
    EVEN: tl.constexpr = EVEN_T and EVEN_C
    c = (tl.program_id(0) % blocks * BLOCK_C).to(tl.int64) + tl.arange(0, BLOCK_C)
    segment = (tl.program_id(0) // blocks) % segments
    batch = (tl.program_id(0) // blocks // segments).to(tl.int64)
    inside = c < channels
    steps = tl.arange(0, BLOCK_T)
    x_pointer += batch * x_batch + nothing
    fresh_pointer += batch * time
    grad_x_pointer += batch * time * CHANNELS * 3 + nothing
    states_pointer += batch * time * CHANNELS + nothing
    cell_pointer += batch * time * CHANNELS + nothing
    grad_pointer += batch * time * CHANNELS + nothing
    here = (batch * segments + segment) * channels
    a0 = tl.load(a_pointer + c, mask=inside, other=0.0).to(tl.float32)
    a1 = tl.load(a_pointer + channels + c, mask=inside, other=0.0).to(tl.float32)
    a2 = tl.load(a_pointer + 2 * channels + c, mask=inside, other=0.0).to(tl.float32)
    h0 = tl.load(h_pointer + batch * channels + c, mask=inside, other=0.0).to(tl.float32)
    mh = tl.load(mu_h_pointer + here + c, mask=inside, other=0.0)
    zero = tl.zeros([BLOCK_C], tl.float32)
    one_ = zero + 1.0
    if LSTM:
        p0 = tl.load(p_pointer + c, mask=inside, other=0.0).to(tl.float32)
        p1 = tl.load(p_pointer + channels + c, mask=inside, other=0.0).to(tl.float32)
        c0 = tl.load(c_pointer + batch * channels + c, mask=inside, other=0.0).to(tl.float32)
        mc = tl.load(mu_c_pointer + here + c, mask=inside, other=0.0)
    else:
        p0, p1, c0, mc = zero, zero, zero, zero
    # The transposed product of the segment's Jacobians, by columns: of what enters as μ_c, and as μ_h.
    pcc, phc, pch, phh = one_, zero, zero, one_
    w0, w1, w2, w3, w4 = zero, zero, zero, zero, zero
    first = segment * length
    tiles = tl.cdiv(min(length, time - first), BLOCK_T)
    start = first + (tiles - 1) * BLOCK_T
    x0 = tile_at(x_pointer, start, steps, c, x_time, time, inside, EVEN)
    x1 = tile_at(x_pointer + x_gate, start, steps, c, x_time, time, inside, EVEN)
    x2 = tile_at(x_pointer + 2 * x_gate, start, steps, c, x_time, time, inside, EVEN)
    h = tile_before(states_pointer, start, steps, c, CHANNELS, time, inside, EVEN)
    g = tile_at(grad_pointer, start, steps, c, CHANNELS, time, inside, EVEN)
    if LSTM:
        cell = tile_before(cell_pointer, start, steps, c, CHANNELS, time, inside, EVEN)
    for _tile in range(tiles):
        early = tl.maximum(start - BLOCK_T, 0)
        y0 = tile_at(x_pointer, early, steps, c, x_time, time, inside, EVEN)
        y1 = tile_at(x_pointer + x_gate, early, steps, c, x_time, time, inside, EVEN)
        y2 = tile_at(x_pointer + 2 * x_gate, early, steps, c, x_time, time, inside, EVEN)
        next_h = tile_before(states_pointer, early, steps, c, CHANNELS, time, inside, EVEN)
        next_g = tile_at(grad_pointer, early, steps, c, CHANNELS, time, inside, EVEN)
        if LSTM:
            next_cell = tile_before(cell_pointer, early, steps, c, CHANNELS, time, inside, EVEN)
        there = (start + steps < time)[:, None]
        begins = (start + steps == 0)[:, None]
        x0, x1, x2 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32)
        g = g.to(tl.float32)
        h = tl.where(begins, h0[None, :], h.to(tl.float32))
        if LSTM:
            cell = tl.where(begins, c0[None, :], cell)
        if FRESH:
            fresh = ((marks(fresh_pointer, start, steps, time) >> steps) & 1)[:, None] != 0
            h = tl.where(fresh, 0.0, h)
            if LSTM:
                cell = tl.where(fresh, 0.0, cell)
        mus = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if LSTM:
            f, z, o, _, squashed, _ = lstm_step(
                cell,
                h,
                x0 * -LOG2E,
                x1,
                x2 * -LOG2E,
                (a0 * -LOG2E)[None, :],
                a1[None, :],
                (a2 * -LOG2E)[None, :],
                (p0 * -LOG2E)[None, :],
                (p1 * -LOG2E)[None, :],
            )
            through, d0, d1, d2, keep, turn, back = lstm_pull(
                cell, f, z, o, squashed, p0[None, :], p1[None, :], a0[None, :], a1[None, :], a2[None, :]
            )
            next_c = tl.fma(f, cell - z, z)
            if FRESH:
                keep = tl.where(fresh, 0.0, keep)
                turn = tl.where(fresh, 0.0, turn)
                back = tl.where(fresh, 0.0, back)
            # Steps beyond the end pass everything on.
            if not EVEN:
                through = tl.where(there, through, 0.0)
                keep = tl.where(there, keep, 1.0)
                turn = tl.where(there, turn, 0.0)
                back = tl.where(there, back, 1.0)
            es = mus
            for j in tl.static_range(BLOCK_T):
                i = BLOCK_T - 1 - j
                mh += at_step(g, steps, i)
                e = tl.fma(mh, at_step(through, steps, i), mc)
                mus = put_step(mus, steps, i, mh)
                es = put_step(es, steps, i, e)
                k, s, b = at_step(keep, steps, i), at_step(turn, steps, i), at_step(back, steps, i)
                mc = e * k
                mh = tl.fma(e, s, mh * b)
                if TOTALS:
                    v = at_step(through, steps, i)
                    ec, eh = tl.fma(phc, v, pcc), tl.fma(phh, v, pch)
                    pcc, pch = ec * k, eh * k
                    phc, phh = tl.fma(ec, s, phc * b), tl.fma(eh, s, phh * b)
            r0, r1, r2 = es * d0, es * d1, mus * d2
            if not TOTALS:
                if not EVEN:
                    r0, r1, r2 = tl.where(there, r0, 0.0), tl.where(there, r1, 0.0), tl.where(there, r2, 0.0)
                w0 += tl.sum(r0 * h, axis=0)
                w1 += tl.sum(r1 * h, axis=0)
                w2 += tl.sum(r2 * h, axis=0)
                w3 += tl.sum(r0 * cell, axis=0)
                w4 += tl.sum(r2 * next_c, axis=0)
        else:
            z, r, n, _ = gru_step(
                h,
                x0 * -LOG2E,
                x1 * -LOG2E,
                x2,
                (a0 * -LOG2E)[None, :],
                (a1 * -LOG2E)[None, :],
                a2[None, :],
            )
            d0, d1, d2, jacobian = gru_pull(h, z, r, n, a0[None, :], a1[None, :], a2[None, :])
            if FRESH:
                jacobian = tl.where(fresh, 0.0, jacobian)
            if not EVEN:
                jacobian = tl.where(there, jacobian, 1.0)
            for j in tl.static_range(BLOCK_T):
                i = BLOCK_T - 1 - j
                mh += at_step(g, steps, i)
                mus = put_step(mus, steps, i, mh)
                k = at_step(jacobian, steps, i)
                mh *= k
                if TOTALS:
                    phh *= k
            r0, r1, r2 = mus * d0, mus * d1, mus * d2
            if not TOTALS:
                if not EVEN:
                    r0, r1, r2 = tl.where(there, r0, 0.0), tl.where(there, r1, 0.0), tl.where(there, r2, 0.0)
                w0 += tl.sum(r0 * h, axis=0)
                w1 += tl.sum(r1 * h, axis=0)
                w2 += tl.sum(r2 * h * r, axis=0)
        if not TOTALS:
            wide: tl.constexpr = 3 * CHANNELS
            put_tile(grad_x_pointer, r0, start, steps, c, wide, time, inside, EVEN)
            put_tile(grad_x_pointer + CHANNELS, r1, start, steps, c, wide, time, inside, EVEN)
            put_tile(grad_x_pointer + 2 * CHANNELS, r2, start, steps, c, wide, time, inside, EVEN)
        x0, x1, x2, h, g = y0, y1, y2, next_h, next_g
        if LSTM:
            cell = next_cell
        start -= BLOCK_T
    parts: tl.constexpr = 5 if LSTM else 3
    if TOTALS:
        kinds: tl.constexpr = 2 if LSTM else 1
        ends = grad_h_pointer + here * kinds + c
        tl.store(ends, mh, mask=inside)
        products = products_pointer + here * kinds * kinds + c
        tl.store(products, phh, mask=inside)
        if LSTM:
            tl.store(ends + channels, mc, mask=inside)
            tl.store(products + channels, phc, mask=inside)
            tl.store(products + 2 * channels, pch, mask=inside)
            tl.store(products + 3 * channels, pcc, mask=inside)
    else:
        sums = grad_weights_pointer + here * parts + c
        tl.store(sums, w0, mask=inside)
        tl.store(sums + channels, w1, mask=inside)
        tl.store(sums + 2 * channels, w2, mask=inside)
        if LSTM:
            tl.store(sums + 3 * channels, w3, mask=inside)
            tl.store(sums + 4 * channels, w4, mask=inside)
        if segment == 0:
            tl.store(grad_h_pointer + batch * channels + c, mh, mask=inside)
            if LSTM:
                tl.store(grad_c_pointer + batch * channels + c, mc, mask=inside)


@triton.jit
def between(
    products_pointer,
    ends_pointer,
    mu_h_pointer,
    mu_c_pointer,
    grad_h_pointer,  # (batch, channels): the gradient of the last state
    grad_c_pointer,
    channels,
    segments,
    LSTM: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What reaches each segment of the adjoint, from what each does as a whole."""
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    mh = tl.load(grad_h_pointer + batch * channels + c, mask=inside, other=0.0)
    mc = tl.load(grad_c_pointer + batch * channels + c, mask=inside, other=0.0) if LSTM else mh
    kinds: tl.constexpr = 2 if LSTM else 1
    for back in tl.range(0, segments, num_stages=4):
        here = (batch * segments + segments - 1 - back) * channels
        tl.store(mu_h_pointer + here + c, mh, mask=inside)
        ends = ends_pointer + here * kinds + c
        products = products_pointer + here * kinds * kinds + c
        hh = tl.load(products, mask=inside, other=0.0)
        end = tl.load(ends, mask=inside, other=0.0)
        if LSTM:
            tl.store(mu_c_pointer + here + c, mc, mask=inside)
            hc = tl.load(products + channels, mask=inside, other=0.0)
            ch = tl.load(products + 2 * channels, mask=inside, other=0.0)
            cc = tl.load(products + 3 * channels, mask=inside, other=0.0)
            end_c = tl.load(ends + channels, mask=inside, other=0.0)
            mh, mc = hh * mh + hc * mc + end, ch * mh + cc * mc + end_c
        else:
            mh = hh * mh + end
