"""Head-wise cells in Triton: one program walks through all of time with a head's recurrent weights on chip.

A program has one head and a block of rows of the batch: the recurrent product R h is a tensor-core product with
the gates' rows as M and as few as 4 rows of the batch as N. R is cut into `PARTS`, one for each warp, as the batch
axis of a batched product; every warp keeps its part in registers. What a step reads is copied to shared memory in
the background, some steps ahead.

Forward, the rows of all gates are cut, and the state goes to all warps once a step. In the walk back the inner
axis of Rᵀ is cut: a warp has all gradients of its own part of the head, and sums are exchanged once a step. The
gates come from the pre-activations that the forward kernel left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.recurrent_scan_cells import (
    ELMAN,
    GRU,
    LSTM,
    gru_adjoint,
    gru_factors,
    gru_step,
    lstm_adjoint,
    lstm_factors,
    lstm_step,
    slstm_adjoint,
    slstm_factors,
    slstm_step,
    tanh,
)
from ostinato.ops.kernels.triton.recurrent_scan_tiles import four, stack, sum_of_parts


@triton.jit
def _load(pointer, mask, MASKED: tl.constexpr):
    """Elements; 0 outside of the mask."""
    if MASKED:
        return tl.load(pointer, mask=mask, other=0.0)
    else:
        return tl.load(pointer)


@triton.jit(do_not_specialize=["batch", "time", "heads"])
def forward_kernel(
    inputs,  # (batch, time, GATES, heads, DIM)
    weight,  # (GATES, heads, DIM, DIM)
    bias,  # (heads, DIM), for GRU
    start,  # (STATES, batch, heads, DIM) float32
    reset,  # (batch, time) bool
    outputs,  # (batch, time, heads, DIM)
    last,  # as start
    memory,  # (STATES − 1, batch, time, heads, DIM) float32: what enters every step beside h
    gates,  # (batch, time, GATES, heads, DIM) float32: pre-activations
    batch,
    time,
    heads,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    RESET: tl.constexpr,
    SAVE: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """All steps of one head for COLUMNS rows of the batch. WHOLE: no tile reaches over an edge."""
    PADDED: tl.constexpr = 1 if GATES == 1 else 4
    ROWS: tl.constexpr = PADDED * D // PARTS
    kind = inputs.dtype.element_ty
    head = tl.program_id(0)
    d = tl.arange(0, D)[:, None]
    row = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
    mask = (d < DIM) & (row < batch)
    width = heads * DIM
    step = GATES * width
    here = head * DIM + d

    part = tl.arange(0, PARTS)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    gate, out = part // D, part % D
    column = tl.arange(0, D)[None, None, :]
    inside = (gate < GATES) & (out < DIM) & (column < DIM)
    recurrent = tl.load(weight + ((gate * heads + head) * DIM + out) * DIM + column, mask=inside, other=0.0)
    recurrent = tl.where(inside, recurrent, 0.0).to(kind)

    plane = tl.cast(batch, tl.int64) * width
    at = row * width + here
    hidden = _load(start + at, mask, not WHOLE)
    zeros = tl.zeros((D, COLUMNS), tl.float32)
    cell, normalizer, maximum, shift = zeros, zeros, zeros, zeros
    if STATES > 1:
        cell = _load(start + plane + at, mask, not WHOLE)
    if STATES > 2:
        normalizer = _load(start + 2 * plane + at, mask, not WHOLE)
        maximum = _load(start + 3 * plane + at, mask, not WHOLE)
    if CELL == GRU:
        shift = tl.load(bias + here + 0 * row, mask=mask, other=0.0).to(tl.float32)

    # Pointers that go on by one step at a time.
    x_at = inputs + row * time * step + here
    g_at = gates + row * time * step + here
    y_at = outputs + row * time * width + here
    m_at = memory + row * time * width + here
    m_plane = tl.cast(batch, tl.int64) * time * width

    if RESET:
        fresh = tl.load(reset + row * time, mask=row < batch, other=0) != 0
        hidden = tl.where(fresh, 0.0, hidden)
        cell = tl.where(fresh, 0.0, cell)
        normalizer = tl.where(fresh, 0.0, normalizer)
        maximum = tl.where(fresh, 0.0, maximum)
    # The product with what enters a step is made at the end of the step before, and the first one before the loop.
    # That, and the selection above between load and product, make the compiler keep the weights in registers: from
    # a load, or with one product in the loop alone, it leaves them in shared memory and reads them in every step.
    entering = tl.broadcast_to(hidden.to(kind)[None, :, :], (PARTS, D, COLUMNS))
    product = tl.dot(recurrent, entering, input_precision="ieee")
    for t in tl.range(0, time, num_stages=STAGES):
        x1 = _load(x_at, mask, not WHOLE)
        x2, x3, x4 = x1, x1, x1
        if GATES > 1:
            x2 = _load(x_at + width, mask, not WHOLE)
            x3 = _load(x_at + 2 * width, mask, not WHOLE)
        if GATES > 3:
            x4 = _load(x_at + 3 * width, mask, not WHOLE)
        x_at += step
        if RESET:
            fresh = tl.load(reset + row * time + t + 1, mask=(row < batch) & (t + 1 < time), other=0) != 0
        if SAVE and STATES > 1:
            tl.store(m_at, cell, mask=mask)
            if STATES > 2:
                tl.store(m_at + m_plane, normalizer, mask=mask)
                tl.store(m_at + 2 * m_plane, maximum, mask=mask)
            m_at += width

        if GATES == 1:
            a1 = tl.reshape(product, (D, COLUMNS)) + x1
            a2, a3, a4 = a1, a1, a1
        else:
            a1, a2, a3, a4 = four(tl.reshape(product, (4, D, COLUMNS)), D, COLUMNS)
            a1 += x1
            a2 += x2
            if CELL == GRU:
                a3 += shift
            else:
                a3 += x3
                a4 += x4
        if CELL == ELMAN:
            hidden = tanh(a1, PRECISE)
        elif CELL == LSTM:
            hidden, cell = lstm_step(a1, a2, a3, a4, cell, PRECISE)
        elif CELL == GRU:
            hidden = gru_step(a1, a2, a3, x3.to(tl.float32), hidden, PRECISE)
        else:
            hidden, cell, normalizer, maximum = slstm_step(a1, a2, a3, a4, cell, normalizer, maximum, PRECISE)
        tl.store(y_at, hidden.to(kind), mask=mask)
        y_at += width
        if SAVE:
            tl.store(g_at, a1, mask=mask)
            if GATES > 1:
                tl.store(g_at + width, a2, mask=mask)
                tl.store(g_at + 2 * width, a3, mask=mask)
            if GATES > 3:
                tl.store(g_at + 3 * width, a4, mask=mask)
            g_at += step
        if RESET:
            hidden = tl.where(fresh, 0.0, hidden)
            cell = tl.where(fresh, 0.0, cell)
            normalizer = tl.where(fresh, 0.0, normalizer)
            maximum = tl.where(fresh, 0.0, maximum)
        entering = tl.broadcast_to(hidden.to(kind)[None, :, :], (PARTS, D, COLUMNS))
        product = tl.dot(recurrent, entering, input_precision="ieee")

    tl.store(last + at, hidden, mask=mask)
    if STATES > 1:
        tl.store(last + plane + at, cell, mask=mask)
    if STATES > 2:
        tl.store(last + 2 * plane + at, normalizer, mask=mask)
        tl.store(last + 3 * plane + at, maximum, mask=mask)


@triton.jit
def _entering(before, start, t, mask):
    """The output of the step before step t, or at t = 0 the state that the sequence starts from, in float32."""
    hidden = tl.load(before, mask=mask & (t > 0), other=0.0).to(tl.float32)
    return hidden + tl.load(start, mask=mask & (t == 0), other=0.0)


@triton.jit(do_not_specialize=["batch", "time", "heads"])
def backward_kernel(
    inputs,  # as in forward_kernel; read for GRU
    weight,
    start,
    reset,
    outputs,
    memory,
    gates,
    d_outputs,  # (batch, time, heads, DIM)
    d_last,  # (STATES, batch, heads, DIM) float32
    d_inputs,  # (batch, time, GATES, heads, DIM)
    d_candidate,  # (batch, time, heads, DIM), GRU: the gradient of R^n h + b
    d_start,  # (STATES, batch, heads, DIM) float32
    batch,
    time,
    heads,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    STATES: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    RESET: tl.constexpr,
    LAST: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """The walk back: gradients of the pre-activations, and of the state that entered the first step."""
    PADDED: tl.constexpr = 1 if GATES == 1 else 4
    E: tl.constexpr = D // PARTS
    kind = inputs.dtype.element_ty
    head = tl.program_id(0)
    d = tl.arange(0, PARTS)[None, None, :] * E + tl.arange(0, E)[None, :, None]
    row = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[:, None, None]).to(tl.int64)
    mask = (d < DIM) & (row < batch)
    width = heads * DIM
    step = GATES * width
    here = head * DIM + d

    # Rᵀ (PARTS, D in, E · gates): a part of the inner axis is what a part of the tile gives.
    part = tl.arange(0, PARTS)[:, None, None]
    inner = tl.arange(0, E * PADDED)[None, None, :]
    gate, out = inner % PADDED, part * E + inner // PADDED
    column = tl.arange(0, D)[None, :, None]
    inside = (gate < GATES) & (out < DIM) & (column < DIM)
    recurrent = tl.load(weight + ((gate * heads + head) * DIM + out) * DIM + column, mask=inside, other=0.0)
    recurrent = tl.where(inside, recurrent, 0.0).to(kind)

    plane = tl.cast(batch, tl.int64) * width
    at = row * width + here
    zeros = tl.zeros((COLUMNS, E, PARTS), tl.float32)
    direct, d_cell, d_normalizer, d_maximum = zeros, zeros, zeros, zeros  # direct: what reaches h not through R
    if LAST:
        direct = _load(d_last + at, mask, not WHOLE)
        if STATES > 1:
            d_cell = _load(d_last + plane + at, mask, not WHOLE)
        if STATES > 2:
            d_normalizer = _load(d_last + 2 * plane + at, mask, not WHOLE)
            d_maximum = _load(d_last + 3 * plane + at, mask, not WHOLE)

    # Pointers at the last step, that go back by one step at a time.
    g_at = gates + (row * time + time - 1) * step + here
    dx_at = d_inputs + (row * time + time - 1) * step + here
    dy_at = d_outputs + (row * time + time - 1) * width + here
    dn_at = d_candidate + (row * time + time - 1) * width + here
    x_at = inputs + (row * time + time - 1) * step + 2 * width + here
    y_at = outputs + (row * time + time - 2) * width + here
    m_at = memory + (row * time + time - 1) * width + here
    m_plane = tl.cast(batch, tl.int64) * time * width

    # Zeros, in a way that the compiler cannot know, for a first product before the loop, as in the forward kernel.
    nothing = zeros + tl.where(time < 0, time, 0)
    leaving = stack(nothing, nothing, nothing, nothing, GATES, COLUMNS, E, PARTS).to(kind)
    product = tl.dot(recurrent, leaving, input_precision="ieee")
    for back in tl.range(0, time, num_stages=STAGES):
        t = time - 1 - back
        a1 = _load(g_at, mask, not WHOLE)
        a2, a3, a4, x3, old, old_n, old_m = a1, a1, a1, a1, a1, a1, a1
        if GATES > 1:
            a2 = _load(g_at + width, mask, not WHOLE)
            a3 = _load(g_at + 2 * width, mask, not WHOLE)
        if GATES > 3:
            a4 = _load(g_at + 3 * width, mask, not WHOLE)
        if STATES > 1:
            old = _load(m_at, mask, not WHOLE)
        if STATES > 2:
            old_n = _load(m_at + m_plane, mask, not WHOLE)
            old_m = _load(m_at + 2 * m_plane, mask, not WHOLE)
        if CELL == GRU:
            x3 = _load(x_at, mask, not WHOLE)
            old = _entering(y_at, start + at, t, mask)
        dy = _load(dy_at, mask, not WHOLE)
        if RESET:
            fresh = tl.load(reset + row * time + t, mask=row < batch, other=0) != 0

        # First what does not wait for the product of the step after this one, which is on its way.
        if CELL == ELMAN:
            hidden = tanh(a1, PRECISE)
            slope = 1 - hidden * hidden
        elif CELL == LSTM:
            factors = lstm_factors(a1, a2, a3, a4, old, PRECISE)
        elif CELL == GRU:
            if RESET:
                old = tl.where(fresh, 0.0, old)
            factors = gru_factors(a1, a2, a3, x3.to(tl.float32), old, PRECISE)
        else:
            factors = slstm_factors(a1, a2, a3, a4, old, old_n, old_m, PRECISE)
        dh = direct + dy + sum_of_parts(product, COLUMNS, E, PARTS)
        direct = zeros
        if CELL == ELMAN:
            d1 = dh * slope
            d2, d3, d4 = d1, d1, d1
        elif CELL == LSTM:
            d1, d2, d3, d4, d_cell = lstm_adjoint(factors, dh, d_cell)
        elif CELL == GRU:
            d1, d2, dn, d3, direct = gru_adjoint(factors, dh)
            d4 = zeros
        else:
            d1, d2, d3, d4, d_cell, d_normalizer, d_maximum = slstm_adjoint(
                factors, dh, d_cell, d_normalizer, d_maximum
            )
        if RESET:
            direct = tl.where(fresh, 0.0, direct)
            d_cell = tl.where(fresh, 0.0, d_cell)
            d_normalizer = tl.where(fresh, 0.0, d_normalizer)
            d_maximum = tl.where(fresh, 0.0, d_maximum)
            l1, l2 = tl.where(fresh, 0.0, d1), tl.where(fresh, 0.0, d2)
            l3, l4 = tl.where(fresh, 0.0, d3), tl.where(fresh, 0.0, d4)
            leaving = stack(l1, l2, l3, l4, GATES, COLUMNS, E, PARTS).to(kind)
        else:
            leaving = stack(d1, d2, d3, d4, GATES, COLUMNS, E, PARTS).to(kind)
        product = tl.dot(recurrent, leaving, input_precision="ieee")

        tl.store(dx_at, d1.to(kind), mask=mask)
        if GATES > 1:
            tl.store(dx_at + width, d2.to(kind), mask=mask)
        if CELL == GRU:
            tl.store(dx_at + 2 * width, dn.to(kind), mask=mask)
            tl.store(dn_at, d3.to(kind), mask=mask)
            dn_at -= width
        if GATES > 3:
            tl.store(dx_at + 2 * width, d3.to(kind), mask=mask)
            tl.store(dx_at + 3 * width, d4.to(kind), mask=mask)
        dx_at -= step
        g_at -= step
        x_at -= step
        dy_at -= width
        y_at -= width
        m_at -= width

    tl.store(d_start + at, direct + sum_of_parts(product, COLUMNS, E, PARTS), mask=mask)
    if STATES > 1:
        tl.store(d_start + plane + at, d_cell, mask=mask)
    if STATES > 2:
        tl.store(d_start + 2 * plane + at, d_normalizer, mask=mask)
        tl.store(d_start + 3 * plane + at, d_maximum, mask=mask)


@triton.jit(do_not_specialize=["batch", "time", "heads", "chunk"])
def weight_gradient_kernel(
    delta,  # gradients of the pre-activations: (batch · time, columns), a gate's heads begin at gate · heads · DIM
    start,
    reset,
    outputs,
    partial,  # (gates, chunks, heads, DIM, DIM) float32
    batch,
    time,
    heads,
    chunk,  # rows of one program, a multiple of ROWS
    columns,
    DIM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    RESET: tl.constexpr,
    PRECISE: tl.constexpr,
):
    """Σ δ_t h_{t−1}ᵀ over a chunk of the steps of all sequences, for one gate of one head."""
    kind = delta.dtype.element_ty
    head, piece, gate = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, D)[None, :]
    width = heads * DIM
    inside = d < DIM
    total = tl.zeros((D, D), tl.float32)
    first = tl.cast(piece, tl.int64) * chunk
    for block in range(0, chunk, ROWS):
        row = first + block + tl.arange(0, ROWS)[:, None]
        b = row // time
        t = row - b * time
        valid = row < tl.cast(batch, tl.int64) * time
        change = tl.load(delta + row * columns + gate * width + head * DIM + d, mask=valid & inside, other=0.0)
        if RESET:
            valid = valid & (tl.load(reset + row, mask=valid, other=1) == 0)
        entering = _entering(
            outputs + (row - 1) * width + head * DIM + d, start + b * width + head * DIM + d, t, valid & inside
        )
        total = tl.dot(tl.trans(change), entering.to(kind), total, input_precision="ieee")
    o = tl.arange(0, D)[:, None]
    place = ((gate * tl.num_programs(1) + piece) * heads + head) * DIM * DIM
    tl.store(partial + place + o * DIM + d, total, mask=(o < DIM) & inside)
