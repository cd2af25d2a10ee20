"""M²RNN's kernels: a program walks through all of time with some rows of a head's matrix, and its weights, on chip.

The rows of the matrix are the rows of the tensor-core product H W, so a single sequence fills it; none of them meets
another, so each warp has its own, and waits for no other. The forward kernel writes the outputs and nothing else; the
backward kernel recomputes the candidates from them. What is summed over the rows, the gradients of values, gates and
weights, is written for each group of rows and added up outside.

In half precision, what goes from step to step enters its products with more digits than the inputs have: in bfloat16
the memory as float16, forward, and the gradient of the pre-activations in two terms, back; in float16 all in two terms.
With one term of bfloat16 the errors of all steps add up, and W may let them grow: in units of the error that rounding
the exact result makes (130 to 300 steps of 64 × 16 numbers, W = 1 + 0.3 N) up to 28. What remains is that the backward
kernel knows the memory only as it was written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ostinato.ops.kernels.triton.chunk_parts import first_term, remainder
from ostinato.ops.kernels.triton.recurrent_scan_cells import tanh, to_half


@triton.jit
def _row(pointer, place, size, ALL: tl.constexpr):
    """Neighbours at `place`, of which there are `size`, in float32."""
    if ALL:
        return tl.load(pointer + place).to(tl.float32)
    else:
        return tl.load(pointer + place, mask=place < size, other=0.0).to(tl.float32)


@triton.jit
def _product(memory, mixing, HALF: tl.constexpr, TWO: tl.constexpr):
    """The memory times W. In half precision both are float16, which has three digits more than bfloat16."""
    if HALF:
        high = to_half(memory)
        product = tl.dot(high, mixing, input_precision="ieee")
        if TWO:
            product = tl.dot(remainder(memory, high), mixing, product, input_precision="ieee")
    else:
        product = tl.dot(memory, mixing, input_precision="ieee")
    return product


@triton.jit(do_not_specialize=["time", "heads"])
def forward_kernel(
    keys,  # (batch, time, heads, KEY)
    values,  # (batch, time, heads, VALUE)
    forget,  # (batch, time, heads)
    weight,  # (heads, VALUE, VALUE)
    start,  # (batch, heads, KEY, VALUE) float32
    reset,  # (batch, time) bool
    outputs,  # (batch, time, heads, KEY, VALUE)
    last,  # as start
    time,
    heads,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    V: tl.constexpr,
    RESET: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISE: tl.constexpr,
    HALF: tl.constexpr,
    TWO: tl.constexpr,
):
    """All steps of ROWS rows of one head of one row of the batch."""
    kind = keys.dtype.element_ty
    head = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, V)
    i = row[:, None]
    j = column[None, :]
    mask = (i < KEY) & (j < VALUE)
    here = i * VALUE + j

    # A selection between load and product, and a product before the loop: see recurrent_scan_headwise.py.
    u = tl.arange(0, V)[:, None]
    square = (u < VALUE) & (j < VALUE)
    mixing = tl.load(weight + head * VALUE * VALUE + u * VALUE + j, mask=square, other=0.0)
    mixing = tl.where(square, mixing, 0.0).to(tl.float16 if HALF else kind)

    at = (b * heads + head) * KEY * VALUE + here
    memory = tl.load(start + at, mask=mask, other=0.0)
    first = b * time * heads + head
    k_at, v_at, f_at = keys + first * KEY, values + first * VALUE, forget + first
    y_at = outputs + first * KEY * VALUE + here
    k = _row(k_at, row, KEY, KEY % ROWS == 0)
    v = _row(v_at, column, VALUE, VALUE == V)
    f = tl.load(f_at).to(tl.float32)
    if RESET:
        memory = tl.where(tl.load(reset + b * time) != 0, 0.0, memory)
    product = _product(memory, mixing, HALF, TWO)
    # What a step takes is loaded in the one before. What of it feeds the product, and is large enough, the compiler
    # copies to shared memory in the background, STAGES − 1 steps earlier.
    for t in tl.range(0, time, num_stages=STAGES):
        go = tl.where(t + 1 < time, heads, 0)
        k_at += go * KEY
        v_at += go * VALUE
        f_at += go
        next_k = _row(k_at, row, KEY, KEY % ROWS == 0)
        next_v = _row(v_at, column, VALUE, VALUE == V)
        next_f = tl.load(f_at).to(tl.float32)
        candidate = tanh(product + k[:, None] * v[None, :], PRECISE)
        memory = candidate + f * (memory - candidate)
        tl.store(y_at, memory.to(kind), mask=mask)
        y_at += heads * KEY * VALUE
        if RESET:
            fresh = tl.load(reset + b * time + t + 1, mask=t + 1 < time, other=0) != 0
            memory = tl.where(fresh, 0.0, memory)
        product = _product(memory, mixing, HALF, TWO)
        k, v, f = next_k, next_v, next_f
    tl.store(last + at, memory, mask=mask)


@triton.jit
def _step_back(
    entering,
    k,
    v,
    f,
    dy,
    carried,
    d_mixing,
    mixing,
    turned,
    bound,
    CLIP: tl.constexpr,
    PRECISE: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of the memory that enters, of W so far, and of k, v and f."""
    kind = entering.dtype
    product = tl.dot(entering, mixing, input_precision="ieee")
    candidate = tanh(product + k[:, None] * v[None, :], PRECISE)
    delta = carried + dy.to(tl.float32)
    by_candidate = (1 - f) * delta * (1 - candidate * candidate)
    df = tl.sum(delta * (entering.to(tl.float32) - candidate))
    dk = tl.sum(by_candidate * v[None, :], axis=1)
    dv = tl.sum(by_candidate * k[:, None], axis=0)
    change = first_term(by_candidate, kind, "ieee", HALF)
    d_mixing = tl.dot(tl.trans(entering), change, d_mixing, input_precision="ieee")
    carried = tl.dot(change, turned, f * delta, input_precision="ieee")
    if HALF:
        low = remainder(by_candidate, change)
        carried = tl.dot(low, turned, carried, input_precision="ieee")
        d_mixing = tl.dot(tl.trans(entering), low, d_mixing, input_precision="ieee")
    if CLIP:
        carried = tl.minimum(tl.maximum(carried, -bound), bound)
    return carried, d_mixing, dk, dv, df


@triton.jit(do_not_specialize=["time", "heads"])
def backward_kernel(
    keys,  # as in forward_kernel
    values,
    forget,
    weight,
    start,
    reset,
    outputs,
    d_outputs,  # as outputs
    d_last,  # as start
    d_keys,
    d_values,  # for each group of rows, to be summed; in float32 where there are several
    d_forget,  # likewise
    d_weight,  # (groups, batch, heads, VALUE, VALUE) float32, to be summed over groups and batch
    d_start,  # as start
    time,
    heads,
    bound,  # of the gradient that reaches a state from the next step, where CLIP
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    V: tl.constexpr,
    RESET: tl.constexpr,
    CLIP: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISE: tl.constexpr,
    HALF: tl.constexpr,
):
    """The walk back of ROWS rows of one head of one row of the batch."""
    kind = keys.dtype.element_ty
    head = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, V)
    i = row[:, None]
    j = column[None, :]
    mask = (i < KEY) & (j < VALUE)
    here = i * VALUE + j

    u = tl.arange(0, V)[:, None]
    square = (u < VALUE) & (j < VALUE)
    place = head * VALUE * VALUE
    mixing = tl.load(weight + place + u * VALUE + j, mask=square, other=0.0)
    mixing = tl.where(square, mixing, 0.0).to(kind)
    turned = tl.load(weight + place + j * VALUE + u, mask=square, other=0.0)
    turned = tl.where(square, turned, 0.0).to(kind)

    at = (b * heads + head) * KEY * VALUE + here
    final = (b * time + time - 1) * heads + head
    k_at, v_at, f_at = keys + final * KEY, values + final * VALUE, forget + final
    steps = group * tl.num_programs(1) * time * heads + final
    dk_at, dv_at, df_at = d_keys + final * KEY, d_values + steps * VALUE, d_forget + steps
    dy_at = d_outputs + final * KEY * VALUE + here

    carried = tl.load(d_last + at, mask=mask, other=0.0)
    k = _row(k_at, row, KEY, KEY % ROWS == 0)
    v = _row(v_at, column, VALUE, VALUE == V)
    f = tl.load(f_at).to(tl.float32)
    d_mixing = tl.zeros((V, V), tl.float32)
    # The memory that enters is both a factor and a number, for which the compiler does not copy it in the background.
    y_at = outputs + (final - tl.where(time > 1, heads, 0)) * KEY * VALUE + here
    entering = tl.load(y_at, mask=mask, other=0.0)
    for back in tl.range(0, time - 1, num_stages=STAGES):
        y_at -= tl.where(back + 2 < time, heads, 0) * KEY * VALUE
        next_entering = tl.load(y_at, mask=mask, other=0.0)
        dy = tl.load(dy_at, mask=mask, other=0.0)
        k_at -= heads * KEY
        v_at -= heads * VALUE
        f_at -= heads
        next_k = _row(k_at, row, KEY, KEY % ROWS == 0)
        next_v = _row(v_at, column, VALUE, VALUE == V)
        next_f = tl.load(f_at).to(tl.float32)
        if RESET:
            fresh = tl.load(reset + b * time + time - 1 - back) != 0
            entering = tl.where(fresh, 0.0, entering.to(tl.float32)).to(kind)
        carried, d_mixing, dk, dv, df = _step_back(
            entering, k, v, f, dy, carried, d_mixing, mixing, turned, bound, CLIP, PRECISE, HALF
        )
        if RESET:
            carried = tl.where(fresh, 0.0, carried)
        tl.store(dk_at + row, dk.to(kind), mask=row < KEY)
        tl.store(dv_at + column, dv.to(d_values.dtype.element_ty), mask=column < VALUE)
        tl.store(df_at, df.to(d_forget.dtype.element_ty))
        dy_at -= heads * KEY * VALUE
        dk_at -= heads * KEY
        dv_at -= heads * VALUE
        df_at -= heads
        entering, k, v, f = next_entering, next_k, next_v, next_f

    # The first step: what enters it is the state that the sequence starts from.
    entering = tl.load(start + at, mask=mask, other=0.0)
    if RESET:
        fresh = tl.load(reset + b * time) != 0
        entering = tl.where(fresh, 0.0, entering)
    dy = tl.load(dy_at, mask=mask, other=0.0)
    carried, d_mixing, dk, dv, df = _step_back(
        entering.to(kind), k, v, f, dy, carried, d_mixing, mixing, turned, bound, CLIP, PRECISE, HALF
    )
    if RESET:
        carried = tl.where(fresh, 0.0, carried)
    tl.store(dk_at + row, dk.to(kind), mask=row < KEY)
    tl.store(dv_at + column, dv.to(d_values.dtype.element_ty), mask=column < VALUE)
    tl.store(df_at, df.to(d_forget.dtype.element_ty))
    tl.store(d_start + at, carried, mask=mask)
    whose = (group * tl.num_programs(1) + b) * heads + head
    tl.store(d_weight + whose * VALUE * VALUE + u * VALUE + j, d_mixing, mask=square)
