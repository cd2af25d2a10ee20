"""The Triton kernels of `diagonal_scan`: a walk over tiles of time, each tile a scan in registers.

A program owns a block of channels of one sequence, and one segment of its time. It takes the segment tile by
tile, (steps × channels); the state that enters a tile is folded into the tile's first step. What is read is
read once, and loads of the tiles to come are in flight while one is computed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.diagonal_scan_tiles import (
    covers,
    load_row,
    load_tile,
    marked,
    multiply,
    multiply_complex,
    place,
    row,
    scan_tile,
    store_row,
    store_tile,
    times,
)


@triton.jit
def forward_tile(
    a_pointer,
    b_pointer,
    out_pointer,
    fresh_pointer,
    steady_r,
    steady_i,
    hr,
    hi,
    pr,
    pi,
    start,
    time,
    c,
    inside,
    a_channels,
    a_time: tl.constexpr,
    b_time: tl.constexpr,
    b_channel: tl.constexpr,
    out_time: tl.constexpr,
    out_channel: tl.constexpr,
    FRESH: tl.constexpr,
    TOTALS: tl.constexpr,
    STEADY: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile: the state that leaves it, and the product of all transitions so far."""
    MASKED: tl.constexpr = not (EVEN_T and EVEN_C)
    rows = tl.arange(0, BLOCK_T)
    t = start + rows
    begin = start.to(tl.int64)
    mask = covers(t < time, inside, EVEN_T, EVEN_C)
    if STEADY:
        ar, ai = steady_r, steady_i
    else:
        at = rows[:, None] * a_time + a_channels[None, :]
        ar, ai = load_tile(a_pointer + begin * a_time * (2 if A_COMPLEX else 1), at, mask, A_COMPLEX, MASKED)
    at = rows[:, None] * b_time + c[None, :] * b_channel
    br, bi = load_tile(b_pointer + begin * b_time * (2 if COMPLEX else 1), at, mask, COMPLEX, MASKED)
    if not EVEN_T:
        # Steps beyond the end keep the state as it is.
        ar = tl.where((t < time)[:, None], ar, 1.0)
        ai = tl.where((t < time)[:, None], ai, 0.0)
    starts = (rows == 0)[:, None]
    if FRESH:
        fresh = marked(fresh_pointer, t, rows, t < time, BLOCK_T)
        ar = tl.where(fresh, 0.0, ar)
        ai = tl.where(fresh, 0.0, ai)
        starts = starts & (fresh == 0)
    sr, si = times(ar, ai, hr[None, :], hi[None, :], COMPLEX, A_COMPLEX)
    br = tl.where(starts, br + sr, br)
    if COMPLEX:
        bi = tl.where(starts, bi + si, bi)
    xr, xi = scan_tile(ar, ai, br, bi, False, COMPLEX, A_COMPLEX, FRESH)
    hr = row(xr, rows, BLOCK_T - 1)
    if COMPLEX:
        hi = row(xi, rows, BLOCK_T - 1)
    if TOTALS:
        if A_COMPLEX:
            qr, qi = tl.reduce((ar, ai), 0, multiply_complex)
            pr, pi = times(pr, pi, qr, qi, True, True)
        else:
            pr = pr * tl.reduce(ar, 0, multiply)
    else:
        at = rows[:, None] * out_time + c[None, :] * out_channel
        store_tile(out_pointer + begin * out_time * (2 if COMPLEX else 1), at, xr, xi, mask, COMPLEX, MASKED)
    return hr, hi, pr, pi


@triton.jit
def forward(
    a_pointer,
    b_pointer,
    entering,  # (batch, segments, channels) or absent: zeros
    fresh_pointer,  # (batch, time) bytes
    out_pointer,
    last_pointer,  # (batch, channels); with TOTALS (batch, segments, channels)
    product_pointer,  # with TOTALS (batch, segments, channels): the product of the segment's transitions
    time,
    channels,
    segments,
    length,  # of a segment
    inner,  # how many channels share a place on the transition's outer channel axis
    a_batch,
    a_time: tl.constexpr,
    a_outer,
    a_inner: tl.constexpr,
    b_batch,
    b_time: tl.constexpr,
    b_channel: tl.constexpr,
    out_batch,
    out_time: tl.constexpr,
    out_channel: tl.constexpr,
    ENTERS: tl.constexpr,
    FRESH: tl.constexpr,
    TOTALS: tl.constexpr,
    STEADY: tl.constexpr,
    FLAT: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h_t = a_t h_{t−1} + b_t over one segment; with TOTALS only what the segment does as a whole."""
    c, segment, batch = place(channels, segments, BLOCK_C)
    inside = c < channels
    a_pointer += batch * a_batch * (2 if A_COMPLEX else 1)
    b_pointer += batch * b_batch * (2 if COMPLEX else 1)
    out_pointer += batch * out_batch * (2 if COMPLEX else 1)
    fresh_pointer += batch * time
    if FLAT:
        a_channels = c * a_inner
    else:
        a_channels = (c // inner) * a_outer + (c % inner) * a_inner
    here = (batch * segments + segment) * channels + c
    hr = tl.zeros([BLOCK_C], tl.float32)
    hi = hr
    if ENTERS:
        hr, hi = load_row(entering, here, inside, COMPLEX)
    pr = tl.full([BLOCK_C], 1.0, tl.float32)
    pi = tl.zeros([BLOCK_C], tl.float32)
    steady_r, steady_i = pr, pr
    if STEADY:
        steady_r, steady_i = load_row(a_pointer, a_channels, inside, A_COMPLEX)
        steady_r = tl.broadcast_to(steady_r[None, :], [BLOCK_T, BLOCK_C])
        steady_i = tl.broadcast_to(steady_i[None, :], [BLOCK_T, BLOCK_C])
    first = segment * length
    end = min(first + length, time)
    full = (end - first) // BLOCK_T
    for tile in tl.range(0, full, num_stages=STAGES):
        hr, hi, pr, pi = forward_tile(
            a_pointer, b_pointer, out_pointer, fresh_pointer, steady_r, steady_i, hr, hi, pr, pi,
            first + tile * BLOCK_T, time, c, inside, a_channels, a_time, b_time, b_channel, out_time, out_channel,
            FRESH, TOTALS, STEADY, COMPLEX, A_COMPLEX, True, EVEN_C, BLOCK_T,
        )  # fmt: skip
    if not EVEN_T:  # noqa: SIM102 (known when the kernel is compiled, the other not)
        # What fills no tile: only the last segment has it.
        if first + full * BLOCK_T < end:
            hr, hi, pr, pi = forward_tile(
                a_pointer, b_pointer, out_pointer, fresh_pointer, steady_r, steady_i, hr, hi, pr, pi,
                first + full * BLOCK_T, time, c, inside, a_channels, a_time, b_time, b_channel, out_time, out_channel,
                FRESH, TOTALS, STEADY, COMPLEX, A_COMPLEX, False, EVEN_C, BLOCK_T,
            )  # fmt: skip
    if TOTALS:
        store_row(last_pointer, here, hr, hi, inside, COMPLEX)
        store_row(product_pointer, here, pr, pi, inside, COMPLEX)
    elif segment == segments - 1:
        store_row(last_pointer, batch * channels + c, hr, hi, inside, COMPLEX)


@triton.jit
def backward_tile(
    a_pointer,
    grad_pointer,
    h_pointer,
    fresh_pointer,
    grad_b_pointer,
    grad_a_pointer,
    steady_r,
    steady_i,
    begin_r,
    begin_i,
    mr,
    mi,
    pr,
    pi,
    sum_r,
    sum_i,
    start,
    time,
    c,
    inside,
    a_channels,
    a_time: tl.constexpr,
    grad_time: tl.constexpr,
    grad_channel: tl.constexpr,
    h_time: tl.constexpr,
    h_channel: tl.constexpr,
    FRESH: tl.constexpr,
    TOTALS: tl.constexpr,
    STEADY: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_C: tl.constexpr,
    FLIP: tl.constexpr,
    GRAD_A: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One tile of the adjoint: μ of its first step, the product so far, and the sums for a steady transition."""
    MASKED: tl.constexpr = not (EVEN_T and EVEN_C)
    pair: tl.constexpr = 2 if COMPLEX else 1
    rows = tl.arange(0, BLOCK_T)
    # The scan runs from row 0 on; so row 0 is the last step. Where time is contiguous it stays in its order.
    steps = BLOCK_T - 1 - rows if FLIP else rows
    t = start + steps
    begin = start.to(tl.int64)
    mask = covers(t < time, inside, EVEN_T, EVEN_C)
    # Said so that it is known, when the kernel is compiled, of all steps but one.
    early = (steps > 0) | (start > 0)
    if EVEN_T:
        follows = (steps < BLOCK_T - 1) | (start + BLOCK_T < time)
    else:
        follows = t + 1 < time
    if STEADY:
        ar, ai = steady_r, steady_i
    else:
        at = (steps[:, None] + 1) * a_time + a_channels[None, :]
        ar, ai = load_tile(
            a_pointer + begin * a_time * (2 if A_COMPLEX else 1),
            at,
            covers(follows, inside, False, EVEN_C),
            A_COMPLEX,
            True,
        )
    at = steps[:, None] * grad_time + c[None, :] * grad_channel
    gr, gi = load_tile(grad_pointer + begin * grad_time * pair, at, mask, COMPLEX, MASKED)
    # What enters at the end is the gradient of the last state, and passes unchanged.
    ar = tl.where(follows[:, None], ar, 1.0)
    ai = tl.where(follows[:, None], -ai, 0.0)
    ends = (steps == BLOCK_T - 1)[:, None]
    if FRESH:
        fresh = marked(fresh_pointer + 1, t, steps, follows, BLOCK_T)
        ar = tl.where(fresh, 0.0, ar)
        ai = tl.where(fresh, 0.0, ai)
        ends = ends & (fresh == 0)
    sr, si = times(ar, ai, mr[None, :], mi[None, :], COMPLEX, A_COMPLEX)
    gr = tl.where(ends, gr + sr, gr)
    if COMPLEX:
        gi = tl.where(ends, gi + si, gi)
    xr, xi = scan_tile(ar, ai, gr, gi, not FLIP, COMPLEX, A_COMPLEX, FRESH)
    mr = row(xr, steps, 0)
    if COMPLEX:
        mi = row(xi, steps, 0)
    if TOTALS:
        if A_COMPLEX:
            qr, qi = tl.reduce((ar, ai), 0, multiply_complex)
            pr, pi = times(pr, pi, qr, qi, True, True)
        else:
            pr = pr * tl.reduce(ar, 0, multiply)
    else:
        at = steps[:, None] * h_time + c[None, :] * h_channel
        step = begin * h_time * pair
        store_tile(grad_b_pointer + step, at, xr, xi, mask, COMPLEX, MASKED)
        if GRAD_A:
            hr, hi = load_tile(h_pointer + step, at - h_time, mask & early[:, None], COMPLEX, True)
            hr = tl.where(early[:, None], hr, begin_r[None, :])
            if COMPLEX:
                hi = tl.where(early[:, None], hi, begin_i[None, :])
            dr, di = times(xr, xi, hr, -hi, COMPLEX, COMPLEX)
            if FRESH:
                cut = marked(fresh_pointer, t, steps, t < time, BLOCK_T)
                dr = tl.where(cut, 0.0, dr)
                di = tl.where(cut, 0.0, di)
            if STEADY:
                if not EVEN_T:
                    dr = tl.where((t < time)[:, None], dr, 0.0)
                    di = tl.where((t < time)[:, None], di, 0.0)
                sum_r += tl.sum(dr, axis=0)
                if COMPLEX:
                    sum_i += tl.sum(di, axis=0)
            else:
                store_tile(grad_a_pointer + step, at, dr, di, mask, COMPLEX, MASKED)
    return mr, mi, pr, pi, sum_r, sum_i


@triton.jit
def backward(
    a_pointer,
    grad_pointer,
    h_pointer,  # the states
    state_pointer,  # (batch, channels) or absent: zeros
    entering,  # (batch, segments, channels): the adjoint that comes from the segment after
    fresh_pointer,
    grad_b_pointer,
    grad_a_pointer,  # (batch, time, channels), or with STEADY (batch, segments, channels)
    grad_state_pointer,
    product_pointer,
    time,
    channels,
    segments,
    length,
    inner,
    a_batch,
    a_time: tl.constexpr,
    a_outer,
    a_inner: tl.constexpr,
    grad_batch,
    grad_time: tl.constexpr,
    grad_channel: tl.constexpr,
    h_batch,  # of the states and of the gradients that are written
    h_time: tl.constexpr,
    h_channel: tl.constexpr,
    ENTERS: tl.constexpr,
    FRESH: tl.constexpr,
    TOTALS: tl.constexpr,
    STEADY: tl.constexpr,
    FLAT: tl.constexpr,
    COMPLEX: tl.constexpr,
    A_COMPLEX: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_C: tl.constexpr,
    FLIP: tl.constexpr,
    GRAD_A: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """μ_t = g_t + conj(a_{t+1}) μ_{t+1}: ∂b_t = μ_t, ∂a_t = μ_t conj(h_{t−1}), ∂h_0 = conj(a_1) μ_1."""
    c, segment, batch = place(channels, segments, BLOCK_C)
    inside = c < channels
    pair: tl.constexpr = 2 if COMPLEX else 1
    a_pointer += batch * a_batch * (2 if A_COMPLEX else 1)
    grad_pointer += batch * grad_batch * pair
    h_pointer += batch * h_batch * pair
    grad_b_pointer += batch * h_batch * pair
    if not STEADY:
        grad_a_pointer += batch * h_batch * pair
    fresh_pointer += batch * time
    if FLAT:
        a_channels = c * a_inner
    else:
        a_channels = (c // inner) * a_outer + (c % inner) * a_inner
    here = (batch * segments + segment) * channels + c
    mr, mi = load_row(entering, here, inside, COMPLEX)
    pr = tl.full([BLOCK_C], 1.0, tl.float32)
    pi = tl.zeros([BLOCK_C], tl.float32)
    sum_r = tl.zeros([BLOCK_C], tl.float32)
    sum_i = tl.zeros([BLOCK_C], tl.float32)
    begin_r, begin_i = pi, pi
    if ENTERS:
        begin_r, begin_i = load_row(state_pointer, batch * channels + c, inside, COMPLEX)
    steady_r, steady_i = pr, pr
    if STEADY:
        steady_r, steady_i = load_row(a_pointer, a_channels, inside, A_COMPLEX)
        steady_r = tl.broadcast_to(steady_r[None, :], [BLOCK_T, BLOCK_C])
        steady_i = tl.broadcast_to(steady_i[None, :], [BLOCK_T, BLOCK_C])
    first = segment * length
    end = min(first + length, time)
    full = (end - first) // BLOCK_T
    if not EVEN_T:  # noqa: SIM102
        if first + full * BLOCK_T < end:
            mr, mi, pr, pi, sum_r, sum_i = backward_tile(
                a_pointer, grad_pointer, h_pointer, fresh_pointer, grad_b_pointer, grad_a_pointer,
                steady_r, steady_i, begin_r, begin_i, mr, mi, pr, pi, sum_r, sum_i,
                first + full * BLOCK_T, time, c, inside, a_channels, a_time, grad_time, grad_channel, h_time, h_channel,
                FRESH, TOTALS, STEADY, COMPLEX, A_COMPLEX, False, EVEN_C, FLIP, GRAD_A, BLOCK_T,
            )  # fmt: skip
    for tile in tl.range(0, full, num_stages=STAGES):
        mr, mi, pr, pi, sum_r, sum_i = backward_tile(
            a_pointer, grad_pointer, h_pointer, fresh_pointer, grad_b_pointer, grad_a_pointer,
            steady_r, steady_i, begin_r, begin_i, mr, mi, pr, pi, sum_r, sum_i,
            first + (full - 1 - tile) * BLOCK_T, time, c, inside, a_channels, a_time, grad_time, grad_channel,
            h_time, h_channel,
            FRESH, TOTALS, STEADY, COMPLEX, A_COMPLEX, True, EVEN_C, FLIP, GRAD_A, BLOCK_T,
        )  # fmt: skip
    if TOTALS:
        store_row(grad_state_pointer, here, mr, mi, inside, COMPLEX)
        store_row(product_pointer, here, pr, pi, inside, COMPLEX)
    else:
        if STEADY and GRAD_A:
            store_row(grad_a_pointer, here, sum_r, sum_i, inside, COMPLEX)
        if segment == 0:
            ar, ai = load_row(a_pointer, a_channels, inside, A_COMPLEX)
            dr, di = times(ar, -ai, mr, mi, COMPLEX, A_COMPLEX)
            if FRESH:
                cut = tl.load(fresh_pointer) != 0
                dr = tl.where(cut, 0.0, dr)
                di = tl.where(cut, 0.0, di)
            store_row(grad_state_pointer, batch * channels + c, dr, di, inside, COMPLEX)
