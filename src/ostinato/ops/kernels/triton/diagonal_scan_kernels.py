"""The Triton kernels of `diagonal_scan`: a walk over tiles of time, each tile a scan in registers.

A program owns a block of channels of one sequence, and one segment of its time. It takes the segment tile by
tile, (steps × channels); the state that enters a tile is folded into the tile's first step. What is read is
read once, and loads of the tiles to come are in flight while one is computed.

Complex numbers are interleaved pairs of float32; in real kernels the imaginary parts are never computed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def times(xr, xi, yr, yi, COMPLEX: tl.constexpr):
    """x y."""
    if COMPLEX:
        return xr * yr - xi * yi, xr * yi + xi * yr
    else:
        return xr * yr, xi


@triton.jit
def compose(a1, b1, a2, b2):
    """(a₂, b₂) ∘ (a₁, b₁)."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def compose_forgetting(a1, b1, a2, b2):
    """The same, where a₂ = 0 forgets also what is not finite."""
    return tl.where(a2 == 0, 0.0, a1 * a2), tl.where(a2 == 0, b2, a2 * b1 + b2)


@triton.jit
def compose_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    """`compose` for pairs."""
    return (
        ar1 * ar2 - ai1 * ai2,
        ar1 * ai2 + ai1 * ar2,
        ar2 * br1 - ai2 * bi1 + br2,
        ar2 * bi1 + ai2 * br1 + bi2,
    )


@triton.jit
def compose_complex_forgetting(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    """`compose_forgetting` for pairs."""
    zero = (ar2 == 0) & (ai2 == 0)
    return (
        tl.where(zero, 0.0, ar1 * ar2 - ai1 * ai2),
        tl.where(zero, 0.0, ar1 * ai2 + ai1 * ar2),
        tl.where(zero, br2, ar2 * br1 - ai2 * bi1 + br2),
        tl.where(zero, bi2, ar2 * bi1 + ai2 * br1 + bi2),
    )


@triton.jit
def scan_tile(ar, ai, br, bi, REVERSE: tl.constexpr, COMPLEX: tl.constexpr, FORGETTING: tl.constexpr):
    """All states of a tile that starts from zero, along axis 0."""
    if COMPLEX:
        if FORGETTING:
            _, _, hr, hi = tl.associative_scan((ar, ai, br, bi), 0, compose_complex_forgetting, reverse=REVERSE)
        else:
            _, _, hr, hi = tl.associative_scan((ar, ai, br, bi), 0, compose_complex, reverse=REVERSE)
        return hr, hi
    else:
        if FORGETTING:
            _, hr = tl.associative_scan((ar, br), 0, compose_forgetting, reverse=REVERSE)
        else:
            _, hr = tl.associative_scan((ar, br), 0, compose, reverse=REVERSE)
        return hr, hr


@triton.jit
def row(tile, rows, index):
    """Row `index` of a tile. Summed as integers, so that a row held in registers is found without an addition."""
    bits = tile.to(tl.int32, bitcast=True)
    return tl.sum(tl.where((rows == index)[:, None], bits, 0), axis=0).to(tl.float32, bitcast=True)


@triton.jit
def multiply(x, y):
    """For `tl.reduce`."""
    return x * y


@triton.jit
def multiply_complex(xr, xi, yr, yi):
    """For `tl.reduce`."""
    return xr * yr - xi * yi, xr * yi + xi * yr


@triton.jit
def load_tile(pointer, offsets, mask, COMPLEX: tl.constexpr, MASKED: tl.constexpr):
    """A (steps, channels) tile as float32: real and imaginary parts."""
    if COMPLEX:
        pairs = pointer + 2 * offsets[:, :, None] + tl.arange(0, 2)[None, None, :]
        if MASKED:
            x = tl.load(pairs, mask=mask[:, :, None], other=0.0)
        else:
            x = tl.load(pairs)
        return tl.split(x)
    else:
        if MASKED:
            x = tl.load(pointer + offsets, mask=mask, other=0.0)
        else:
            x = tl.load(pointer + offsets)
        x = x.to(tl.float32)
        return x, x


@triton.jit
def store_tile(pointer, offsets, xr, xi, mask, COMPLEX: tl.constexpr, MASKED: tl.constexpr):
    """The inverse of `load_tile`, in the type of the pointer."""
    if COMPLEX:
        pairs = pointer + 2 * offsets[:, :, None] + tl.arange(0, 2)[None, None, :]
        if MASKED:
            tl.store(pairs, tl.join(xr, xi), mask=mask[:, :, None])
        else:
            tl.store(pairs, tl.join(xr, xi))
    else:
        if MASKED:
            tl.store(pointer + offsets, xr.to(pointer.dtype.element_ty), mask=mask)
        else:
            tl.store(pointer + offsets, xr.to(pointer.dtype.element_ty))


@triton.jit
def load_row(pointer, offsets, mask, COMPLEX: tl.constexpr):
    """One number a channel, as float32."""
    if COMPLEX:
        return tl.load(pointer + 2 * offsets, mask=mask, other=0.0), tl.load(
            pointer + 2 * offsets + 1, mask=mask, other=0.0
        )
    else:
        x = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
        return x, x


@triton.jit
def store_row(pointer, offsets, xr, xi, mask, COMPLEX: tl.constexpr):
    """The inverse of `load_row`."""
    if COMPLEX:
        tl.store(pointer + 2 * offsets, xr, mask=mask)
        tl.store(pointer + 2 * offsets + 1, xi, mask=mask)
    else:
        tl.store(pointer + offsets, xr.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def place(channels, segments, BLOCK_C: tl.constexpr):
    """Which channel block, segment and sequence a program has: neighbours in the grid are neighbours in memory."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    block = program % blocks
    program = program // blocks
    return block * BLOCK_C + tl.arange(0, BLOCK_C), program % segments, (program // segments).to(tl.int64)


@triton.jit
def covers(steps, inside, EVEN_T: tl.constexpr, EVEN_C: tl.constexpr):
    """Which elements of a tile are there, given which steps and which channels are; tiles may fit exactly."""
    if EVEN_T:
        return inside[None, :]
    elif EVEN_C:
        return steps[:, None]
    else:
        return steps[:, None] & inside[None, :]


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
    a_time,
    a_outer,
    a_inner,
    b_batch,
    b_time,
    b_channel,
    out_batch,
    out_time,
    out_channel,
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
    MASKED: tl.constexpr = not (EVEN_T and EVEN_C)
    c, segment, batch = place(channels, segments, BLOCK_C)
    rows = tl.arange(0, BLOCK_T)
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
    if ENTERS:
        hr, hi = load_row(entering, here, inside, COMPLEX)
    else:
        hr = tl.zeros([BLOCK_C], tl.float32)
        hi = hr
    pr = tl.full([BLOCK_C], 1.0, tl.float32)
    pi = tl.zeros([BLOCK_C], tl.float32)
    if STEADY:
        steady_r, steady_i = load_row(a_pointer, a_channels, inside, A_COMPLEX)
        steady_r = tl.broadcast_to(steady_r[None, :], [BLOCK_T, BLOCK_C])
        steady_i = tl.broadcast_to(steady_i[None, :], [BLOCK_T, BLOCK_C])
    first = segment * length
    for tile in tl.range(0, tl.cdiv(min(length, time - first), BLOCK_T), num_stages=STAGES):
        start = first + tile * BLOCK_T
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
        if COMPLEX and not A_COMPLEX:
            ai = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        if not EVEN_T:
            # Steps beyond the end keep the state as it is.
            ar = tl.where((t < time)[:, None], ar, 1.0)
            ai = tl.where((t < time)[:, None], ai, 0.0)
        if FRESH:
            fresh = tl.load(fresh_pointer + t, mask=t < time, other=0)[:, None] != 0
            ar = tl.where(fresh, 0.0, ar)
            ai = tl.where(fresh, 0.0, ai)
        sr, si = times(ar, ai, hr[None, :], hi[None, :], COMPLEX)
        starts = (rows == 0)[:, None]
        if FRESH:
            starts = starts & (fresh == 0)
        br = tl.where(starts, br + sr, br)
        if COMPLEX:
            bi = tl.where(starts, bi + si, bi)
        xr, xi = scan_tile(ar, ai, br, bi, False, COMPLEX, FRESH)
        hr = row(xr, rows, BLOCK_T - 1)
        if COMPLEX:
            hi = row(xi, rows, BLOCK_T - 1)
        if TOTALS:
            if COMPLEX:
                qr, qi = tl.reduce((ar, ai), 0, multiply_complex)
                pr, pi = times(pr, pi, qr, qi, True)
            else:
                pr = pr * tl.reduce(ar, 0, multiply)
        else:
            at = rows[:, None] * out_time + c[None, :] * out_channel
            store_tile(out_pointer + begin * out_time * (2 if COMPLEX else 1), at, xr, xi, mask, COMPLEX, MASKED)
    if TOTALS:
        store_row(last_pointer, here, hr, hi, inside, COMPLEX)
        store_row(product_pointer, here, pr, pi, inside, COMPLEX)
    elif segment == segments - 1:
        store_row(last_pointer, batch * channels + c, hr, hi, inside, COMPLEX)


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
    a_time,
    a_outer,
    a_inner,
    grad_batch,
    grad_time,
    grad_channel,
    h_batch,  # of the states and of the gradients that are written
    h_time,
    h_channel,
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
    MASKED: tl.constexpr = not (EVEN_T and EVEN_C)
    c, segment, batch = place(channels, segments, BLOCK_C)
    rows = tl.arange(0, BLOCK_T)
    # The scan runs from row 0 on; so row 0 is the last step. Where time is contiguous it stays in its order.
    steps = BLOCK_T - 1 - rows if FLIP else rows
    inside = c < channels
    pair: tl.constexpr = 2 if COMPLEX else 1
    a_pair: tl.constexpr = 2 if A_COMPLEX else 1
    a_pointer += batch * a_batch * a_pair
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
    if ENTERS:
        begin_r, begin_i = load_row(state_pointer, batch * channels + c, inside, COMPLEX)
    else:
        begin_r = tl.zeros([BLOCK_C], tl.float32)
        begin_i = begin_r
    if STEADY:
        steady_r, steady_i = load_row(a_pointer, a_channels, inside, A_COMPLEX)
        steady_r = tl.broadcast_to(steady_r[None, :], [BLOCK_T, BLOCK_C])
        steady_i = tl.broadcast_to(steady_i[None, :], [BLOCK_T, BLOCK_C])
    first = segment * length
    tiles = tl.cdiv(min(length, time - first), BLOCK_T)
    for tile in tl.range(0, tiles, num_stages=STAGES):
        start = first + (tiles - 1 - tile) * BLOCK_T
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
            ar, ai = load_tile(a_pointer + begin * a_time * a_pair, at, covers(follows, inside, False, EVEN_C), A_COMPLEX, True)
        at = steps[:, None] * grad_time + c[None, :] * grad_channel
        gr, gi = load_tile(grad_pointer + begin * grad_time * pair, at, mask, COMPLEX, MASKED)
        if COMPLEX and not A_COMPLEX:
            ai = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
        # What enters at the end is the gradient of the last state, and passes unchanged.
        ar = tl.where(follows[:, None], ar, 1.0)
        ai = tl.where(follows[:, None], -ai, 0.0)
        ends = (steps == BLOCK_T - 1)[:, None]
        if FRESH:
            fresh = tl.load(fresh_pointer + t + 1, mask=follows, other=0)[:, None] != 0
            ar = tl.where(fresh, 0.0, ar)
            ai = tl.where(fresh, 0.0, ai)
            ends = ends & (fresh == 0)
        sr, si = times(ar, ai, mr[None, :], mi[None, :], COMPLEX)
        gr = tl.where(ends, gr + sr, gr)
        if COMPLEX:
            gi = tl.where(ends, gi + si, gi)
        xr, xi = scan_tile(ar, ai, gr, gi, not FLIP, COMPLEX, FRESH)
        mr = row(xr, steps, 0)
        if COMPLEX:
            mi = row(xi, steps, 0)
        if TOTALS:
            if COMPLEX:
                qr, qi = tl.reduce((ar, ai), 0, multiply_complex)
                pr, pi = times(pr, pi, qr, qi, True)
            else:
                pr = pr * tl.reduce(ar, 0, multiply)
        else:
            at = steps[:, None] * h_time + c[None, :] * h_channel
            step = begin * h_time * pair
            store_tile(grad_b_pointer + step, at, xr, xi, mask, COMPLEX, MASKED)
            if GRAD_A:
                before = at - h_time
                hr, hi = load_tile(h_pointer + step, before, mask & early[:, None], COMPLEX, True)
                hr = tl.where(early[:, None], hr, begin_r[None, :])
                if COMPLEX:
                    hi = tl.where(early[:, None], hi, begin_i[None, :])
                dr, di = times(xr, xi, hr, -hi, COMPLEX)
                if FRESH:
                    cut = tl.load(fresh_pointer + t, mask=t < time, other=0)[:, None] != 0
                    dr = tl.where(cut, 0.0, dr)
                    di = tl.where(cut, 0.0, di)
                if STEADY:
                    sum_r += tl.sum(tl.where((t < time)[:, None], dr, 0.0), axis=0)
                    if COMPLEX:
                        sum_i += tl.sum(tl.where((t < time)[:, None], di, 0.0), axis=0)
                else:
                    store_tile(grad_a_pointer + step, at, dr, di, mask, COMPLEX, MASKED)
    if TOTALS:
        store_row(grad_state_pointer, here, mr, mi, inside, COMPLEX)
        store_row(product_pointer, here, pr, pi, inside, COMPLEX)
    else:
        if STEADY and GRAD_A:
            store_row(grad_a_pointer, here, sum_r, sum_i, inside, COMPLEX)
        if segment == 0:
            ar, ai = load_row(a_pointer, a_channels, inside, A_COMPLEX)
            if COMPLEX and not A_COMPLEX:
                ai = tl.zeros([BLOCK_C], tl.float32)
            dr, di = times(ar, -ai, mr, mi, COMPLEX)
            if FRESH:
                cut = tl.load(fresh_pointer) != 0
                dr = tl.where(cut, 0.0, dr)
                di = tl.where(cut, 0.0, di)
            store_row(grad_state_pointer, batch * channels + c, dr, di, inside, COMPLEX)
