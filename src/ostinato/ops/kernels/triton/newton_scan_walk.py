"""Channelwise cells walked step by step in registers, and their adjoint.

The channels of ParaGRU and ParaLSTM never meet, so a lane can walk its channel through all steps with the
state in registers: inputs are read once, outputs written once, and what it costs is the latency of one step
after another. The adjoint is linear and its Jacobians are known beforehand: a step of its chain is two
multiplications, and time can be cut into segments whose effects are composed.

A tile is (steps, channels) with a lane for each channel, so that taking one step out of it is free.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.newton_scan_cells import LOG2E, gru_pull, gru_step, lstm_pull, lstm_step


@triton.jit
def at_step(tile, rows, index):
    """One step of a float32 tile: exact, and free where a lane holds all steps."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((rows == index)[:, None], bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def put_step(tile, rows, index, value):
    """The tile with one step replaced."""
    return tl.where((rows == index)[:, None], value[None, :], tile)


@triton.jit
def tile_at(pointer, start, steps, c, step_stride, time, inside, shift):
    """A tile of the steps `start + steps + shift`; zero outside of the sequence."""
    t = start + steps + shift
    mask = ((t >= 0) & (t < time))[:, None] & inside[None, :]
    base = pointer + (start + shift).to(tl.int64) * step_stride
    return tl.load(base + steps[:, None] * step_stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def marks(pointer, start, steps, time):
    """Which steps of a tile are marked: bit i for step i."""
    t = start + steps
    return tl.sum(tl.load(pointer + t, mask=(t >= 0) & (t < time), other=0).to(tl.int32) << steps, axis=0)


@triton.jit(do_not_specialize=["nothing"])
def walk(
    x_pointer,
    a_pointer,
    p_pointer,
    h_pointer,
    c_pointer,
    fresh_pointer,
    out_pointer,
    cell_pointer,
    last_h_pointer,
    last_c_pointer,
    peak_pointer,
    time,
    channels,
    x_batch,
    x_time,
    x_gate,
    nothing,  # 0. Not known to be: so no alignment is, and each lane loads and keeps one channel
    LSTM: tl.constexpr,
    FRESH: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """All states of h_t = f(h_{t−1}, x_t), and the largest |state| of each channel, NaN if one was."""
    blocks = tl.cdiv(channels, BLOCK_C)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < channels
    steps = tl.arange(0, BLOCK_T)
    x_pointer += batch * x_batch + nothing
    fresh_pointer += batch * time
    out_pointer += batch * time * channels + nothing
    cell_pointer += batch * time * channels + nothing
    h = tl.load(h_pointer + batch * channels + c, mask=inside, other=0.0).to(tl.float32)
    a0 = tl.load(a_pointer + c, mask=inside, other=0.0).to(tl.float32)
    a1 = tl.load(a_pointer + channels + c, mask=inside, other=0.0).to(tl.float32)
    a2 = tl.load(a_pointer + 2 * channels + c, mask=inside, other=0.0).to(tl.float32)
    if LSTM:
        cell = tl.load(c_pointer + batch * channels + c, mask=inside, other=0.0).to(tl.float32)
        p0 = tl.load(p_pointer + c, mask=inside, other=0.0).to(tl.float32) * -LOG2E
        p1 = tl.load(p_pointer + channels + c, mask=inside, other=0.0).to(tl.float32) * -LOG2E
        s0, s1, s2 = -LOG2E, 1.0, -LOG2E
    else:
        cell = h
        s0, s1, s2 = -LOG2E, -LOG2E, 1.0
    a0, a1, a2 = a0 * s0, a1 * s1, a2 * s2
    peak = tl.zeros([BLOCK_C], tl.float32)
    start = tl.program_id(0) * 0
    x0 = tile_at(x_pointer, start, steps, c, x_time, time, inside, 0)
    x1 = tile_at(x_pointer + x_gate, start, steps, c, x_time, time, inside, 0)
    x2 = tile_at(x_pointer + 2 * x_gate, start, steps, c, x_time, time, inside, 0)
    if FRESH:
        fresh = marks(fresh_pointer, start, steps, time)
    for _tile in range(tl.cdiv(time, BLOCK_T)):
        # The next tile is under way while this one is walked.
        y0 = tile_at(x_pointer, start + BLOCK_T, steps, c, x_time, time, inside, 0)
        y1 = tile_at(x_pointer + x_gate, start + BLOCK_T, steps, c, x_time, time, inside, 0)
        y2 = tile_at(x_pointer + 2 * x_gate, start + BLOCK_T, steps, c, x_time, time, inside, 0)
        if FRESH:
            next_fresh = marks(fresh_pointer, start + BLOCK_T, steps, time)
        x0, x1, x2 = x0.to(tl.float32) * s0, x1.to(tl.float32) * s1, x2.to(tl.float32) * s2
        hs = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        cells = hs
        for i in tl.static_range(BLOCK_T):
            if FRESH:
                begins = ((fresh >> i) & 1) != 0
                h = tl.where(begins, 0.0, h)
            if LSTM:
                if FRESH:
                    cell = tl.where(begins, 0.0, cell)
                _, _, _, next_cell, _, next_h = lstm_step(
                    cell, h, at_step(x0, steps, i), at_step(x1, steps, i), at_step(x2, steps, i), a0, a1, a2, p0, p1
                )
                if EVEN:
                    cell = next_cell
                else:
                    cell = tl.where(start + i < time, next_cell, cell)
                if KEEP:
                    cells = put_step(cells, steps, i, cell)
                peak = tl.maximum(peak, tl.abs(cell), propagate_nan=tl.PropagateNan.ALL)
            else:
                _, _, _, next_h = gru_step(
                    h, at_step(x0, steps, i), at_step(x1, steps, i), at_step(x2, steps, i), a0, a1, a2
                )
            if EVEN:
                h = next_h
            else:
                h = tl.where(start + i < time, next_h, h)
            peak = tl.maximum(peak, tl.abs(h), propagate_nan=tl.PropagateNan.ALL)
            hs = put_step(hs, steps, i, h)
        mask = (start + steps < time)[:, None] & inside[None, :]
        at = start.to(tl.int64) * channels + (steps[:, None] * channels + c[None, :])
        tl.store(out_pointer + at, hs.to(out_pointer.dtype.element_ty), mask=mask)
        if KEEP:
            tl.store(cell_pointer + at, cells, mask=mask)
        x0, x1, x2 = y0, y1, y2
        if FRESH:
            fresh = next_fresh
        start += BLOCK_T
    tl.store(last_h_pointer + batch * channels + c, h, mask=inside)
    if LSTM:
        tl.store(last_c_pointer + batch * channels + c, cell, mask=inside)
    tl.store(peak_pointer + batch * channels + c, peak, mask=inside)


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
    x_time,
    x_gate,
    nothing,
    LSTM: tl.constexpr,
    FRESH: tl.constexpr,
    TOTALS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The adjoint μ_t = g_t + J_{t+1}ᵀ μ_{t+1}, and what it means for inputs, weights and the initial state."""
    blocks = tl.cdiv(channels, BLOCK_C)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    segment = (tl.program_id(0) // blocks) % segments
    batch = (tl.program_id(0) // blocks // segments).to(tl.int64)
    inside = c < channels
    steps = tl.arange(0, BLOCK_T)
    x_pointer += batch * x_batch + nothing
    fresh_pointer += batch * time
    grad_x_pointer += batch * time * channels * 3 + nothing
    states_pointer += batch * time * channels + nothing
    cell_pointer += batch * time * channels + nothing
    grad_pointer += batch * time * channels + nothing
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
    x0 = tile_at(x_pointer, start, steps, c, x_time, time, inside, 0)
    x1 = tile_at(x_pointer + x_gate, start, steps, c, x_time, time, inside, 0)
    x2 = tile_at(x_pointer + 2 * x_gate, start, steps, c, x_time, time, inside, 0)
    h = tile_at(states_pointer, start, steps, c, channels, time, inside, -1)
    g = tile_at(grad_pointer, start, steps, c, channels, time, inside, 0)
    if LSTM:
        cell = tile_at(cell_pointer, start, steps, c, channels, time, inside, -1)
    for _tile in range(tiles):
        early = start - BLOCK_T
        y0 = tile_at(x_pointer, early, steps, c, x_time, time, inside, 0)
        y1 = tile_at(x_pointer + x_gate, early, steps, c, x_time, time, inside, 0)
        y2 = tile_at(x_pointer + 2 * x_gate, early, steps, c, x_time, time, inside, 0)
        next_h = tile_at(states_pointer, early, steps, c, channels, time, inside, -1)
        next_g = tile_at(grad_pointer, early, steps, c, channels, time, inside, 0)
        if LSTM:
            next_cell = tile_at(cell_pointer, early, steps, c, channels, time, inside, -1)
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
                r0, r1, r2 = tl.where(there, r0, 0.0), tl.where(there, r1, 0.0), tl.where(there, r2, 0.0)
                w0 += tl.sum(r0 * h, axis=0)
                w1 += tl.sum(r1 * h, axis=0)
                w2 += tl.sum(r2 * h * r, axis=0)
        if not TOTALS:
            mask = there & inside[None, :]
            at = start.to(tl.int64) * channels * 3 + (steps[:, None] * (channels * 3) + c[None, :])
            kind = grad_x_pointer.dtype.element_ty
            tl.store(grad_x_pointer + at, r0.to(kind), mask=mask)
            tl.store(grad_x_pointer + channels + at, r1.to(kind), mask=mask)
            tl.store(grad_x_pointer + 2 * channels + at, r2.to(kind), mask=mask)
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
    for back in range(segments):
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
